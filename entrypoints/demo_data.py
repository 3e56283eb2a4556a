"""Renders the demo catalogue."""

from pathlib import Path
from typing import Annotated

from aliprod import catalogue
from entrypoints.command import command
from entrypoints.places import Within


def main(
    output: Annotated[Path, Within("demo")], departments: int, categories: int, brands: int, products: int,
    images: int, imbalance: float, val_images: int, noise: float, size: int, seed: int,
) -> None:  # fmt: skip
    """output: a new folder; departments, categories, brands, products: branches at each level of the tree; images:
    train photographs of the most frequent class; imbalance: that over those of the rarest; val_images: a class;
    noise: share of wrong labels in train, their truth in truth.csv; size: of the pictures, pixels; seed."""
    shape = {"departments": departments, "categories": categories, "brands": brands, "products": products}
    truth = catalogue.render(
        output, **shape, images=images, imbalance=imbalance, val_images=val_images, noise=noise, size=size, seed=seed
    )
    print(f"{output.resolve()}: {len(truth)} photographs of {truth['true_class_id'].nunique()} products")


if __name__ == "__main__":
    command(main)
