"""Recipes: what is written is what is read, and whatever is impossible is refused in one readable line."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from aliprod import InputError, recipe
from aliprod.recipe import Round, override, read, to_toml

SHIPPED = sorted((Path(__file__).parents[1] / "entrypoints" / "recipes").glob("*.toml"))
ROUND = '[[round]]\nname = "a"\n'


@pytest.fixture
def refusal(tmp_path):
    """Writes a recipe file, and gives the one line with which it is refused."""

    def refuse(text: str | bytes) -> str:
        path = tmp_path / "wrong.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(InputError) as caught:
            read(path)
        message = str(caught.value)
        assert message.startswith(f"{path}: ")
        assert "\n" not in message
        return message.removeprefix(f"{path}: ")

    return refuse


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_recipe_reads_and_survives_a_round_trip(path, tmp_path):
    shipped = read(path)
    assert shipped.name == path.stem
    for row in shipped.rounds:
        again = tmp_path / f"{row.name}.toml"
        again.write_text(to_toml(row), encoding="utf-8")
        assert read(again).row("") == row


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"samples_per_class": (2, 9), "reported": {"num_classes": 14132, "gap": 0.7972}},
        {"reported": {}},
        {"reported": {"top 5, %": 1e-9, "naïve": 2.5}},
        {"lr": 1e-7, "weight_decay": 0, "warmup_epochs": 0.5, "seed": 2**32 - 1},
        {"freeze": 3, "compile": True, "precision": "bf16"},
        {"init": 'C:\\net\\"ä".pth', "manifest": "a\tb.csv"},
        {"init": "\N{SHOPPING TROLLEY}\x7f#=[]"},
    ],
)
def test_what_to_toml_writes_reads_back_equal(fields, tmp_path):
    row = Round(name="v1.2-b", **fields)
    path = tmp_path / "again.toml"
    path.write_text(to_toml(row), encoding="utf-8")
    assert read(path).rounds == (row,)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("epochs = 0", "epochs 0: must be greater than or equal to 1"),
        ("epochs = 2.5", "epochs 2.5: must be a valid integer"),
        ("epochs = true", "epochs True: must be a valid integer"),
        ("epochs = nan", "epochs nan: must be a valid integer"),
        ("batch_size = 1", "batch_size 1: must be greater than or equal to 2"),
        ("lr = -1", "lr -1: must be greater than 0"),
        ("lr = 11", "lr 11: must be less than or equal to 10"),
        ('lr = "abc"', "lr 'abc': must be a valid number"),
        ('lr = "1e-3"', "lr '1e-3': must be a valid number"),
        ("lr = nan", "lr nan: must be a finite number"),
        ("lr = inf", "lr inf: must be a finite number"),
        ("image_size = 31", "image_size 31: must be greater than or equal to 32"),
        ("label_smoothing = 1.0", "label_smoothing 1.0: must be less than 1"),
        ("max_corrupt_share = 1.5", "max_corrupt_share 1.5: must be less than or equal to 1"),
        ("seed = -1", "seed -1: must be greater than or equal to 0"),
        ("seed = 4294967296", "seed 4294967296: must be less than 4294967296"),
        ('compile = "no"', "compile 'no': must be a valid boolean"),
        ("compile = 0", "compile 0: must be a valid boolean"),
        ('loss = "hinge"', "loss 'hinge': must be "),
        ('head = "tree"', "head 'tree': must be "),
        ('precision = "int8"', "precision 'int8': must be 'fp32', 'bf16', 'fp16' or 'mixed'"),
        ('augment = "medium"', "augment 'medium': must be 'none', 'light' or 'strong'"),
        ('freeze = "some"', "freeze 'some': must be 'none' or 'all', or must be a valid integer (What stays"),
        ("freeze = 0", "freeze 0: must be 'none' or 'all', or must be greater than or equal to 1"),
        ('init = ""', "init '': "),
        ('manifest = "val"', "manifest 'val': is for scoring; train, balanced"),
        ("samples_per_class = [5, 2]", "samples_per_class [5, 2]: least must not exceed most"),
        ("samples_per_class = [5]", "samples_per_class [5]: "),
        ("samples_per_class = [1, 2, 3]", "samples_per_class [1, 2, 3]: "),
        ("samples_per_class = [0, 9]", "samples_per_class 0: must be greater than or equal to 1"),
        ("samples_per_class = 5", "samples_per_class 5: "),
        ("images_per_class = 96", "images_per_class 96: must be below batch_size 96, or all photographs of a batch"),
        ("images_per_class = 4\nbatch_size = 2", "images_per_class 4: must be below batch_size 2"),
        ("warmup_epochs = 2", "warmup_epochs 2.0 must not exceed epochs 1"),
        ('reported = { gap = "good" }', "reported 'good': must be a valid number"),
        ("epoch = 3", "epoch 3: no such field; there are name, init, manifest, samples_per_class"),
    ],
)
def test_impossible_values_are_refused_with_field_value_and_what_is_allowed(refusal, line, words):
    message = refusal(f"{ROUND}{line}\n")
    assert message.startswith("round 1: ")
    assert words in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "round: Field required (One [[round]] table a round)"),
        ("round = []", "round []: "),
        ('[round]\nname = "a"', "round: "),
        ("[[round]]\nlr = 1e-3", "round 1: name: Field required"),
        ('[[round]]\nname = "a b"', "round 1: name 'a b': "),
        (ROUND + ROUND, "names must differ: a stands more than once"),
        (ROUND + '[[round]]\nname = "b"\nlr = 0', "round 2: lr 0: must be greater than 0"),
        (ROUND + "[extra]\nx = 1", "extra: no such field; there are name, round"),
        ("[[round]\nname", "not TOML: "),
        (ROUND + "epochs = 1\nepochs = 2", "not TOML: "),
        (b"\xff\xfex", "begins as UTF-16 does and goes on otherwise; save it as UTF-8"),
        (ROUND.encode() + b"# \xe4", "line 3: byte 0xe4 is not UTF-8; save it as UTF-8"),
    ],
)
def test_files_that_are_no_recipes_are_refused(refusal, text, words):
    assert refusal(text).startswith(words)


def test_an_unknown_round_is_answered_with_the_choices(tmp_path):
    path = tmp_path / "two.toml"
    path.write_text(f'{ROUND}[[round]]\nname = "b"\n')
    recipe = read(path)
    assert (recipe.row("").name, recipe.row("a").name, recipe.row("b").name) == ("a", "a", "b")
    with pytest.raises(InputError, match="recipe two: no round 'c'; it has a, b"):
        recipe.row("c")


@pytest.mark.parametrize(
    ("overrides", "changes"),
    [
        ("", {}),
        ("lr=3e-4 epochs=2", {"lr": 3e-4, "epochs": 2}),
        ("  lr=1 \n lr=2 ", {"lr": 2.0}),
        ("samples_per_class=[2,9]", {"samples_per_class": (2, 9)}),
        ("freeze=all augment=light", {"freeze": "all", "augment": "light"}),
        ('freeze=2 precision="bf16"', {"freeze": 2, "precision": "bf16"}),
        ("compile=true", {"compile": True}),
        ("init=models:/shop@champion", {"init": "models:/shop@champion"}),
        ("init=runs:/1a2b/model?x=y", {"init": "runs:/1a2b/model?x=y"}),
        ("manifest=/data/clean.csv name=v2.1", {"manifest": "/data/clean.csv", "name": "v2.1"}),
        ("reported={gap=0.5}", {"reported": {"gap": 0.5}}),
    ],
)
def test_overrides_replace_the_named_fields_and_no_others(overrides, changes):
    row = Round(name="a", epochs=3)
    assert override(row, overrides) == row.model_copy(update=changes)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("junk", "'junk' is not of the form field=value"),
        ("lr=1 =3", "'=3' is not of the form field=value"),
        ("lr=", "lr '': must be a valid number"),
        ("lr=3e-4, epochs=2", "lr '3e-4,': must be a valid number"),
        ("epochs=2.5", "epochs 2.5: must be a valid integer"),
        ("compile=True", "compile 'True': must be a valid boolean"),
        ("learning_rate=1", "learning_rate 1: no such field; there are name, init"),
        ("samples_per_class=[9,2]", "samples_per_class [9, 2]: least must not exceed most"),
        ("warmup_epochs=5", "warmup_epochs 5.0 must not exceed epochs 1"),
    ],
)
def test_impossible_overrides_are_refused(overrides, words):
    with pytest.raises(InputError) as caught:
        override(Round(name="a"), overrides)
    assert str(caught.value).startswith(f"overrides: {words}")


def test_a_round_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        Round(name="a").lr = 1.0


def test_every_field_says_what_it_is():
    assert all(field.description for field in Round.model_fields.values())


CLEAN = '[[clean]]\nname = "reliable"\n'


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("", "clean 1: models: Field required"),
        ("models = []", "clean 1: models []: "),
        (
            'models = ["a"]\nrule = "guess"',
            "clean 1: rule 'guess': must be 'misclassified', 'disagreement' or 'confident'",
        ),
        ('models = ["a"]\nrule = "disagreement"', "clean 1: votes 2: there are only 1 models to vote"),
        ('models = ["a"]\nfolds = 1', "clean 1: folds 1: one part has no others to learn from"),
        ('models = ["a"]\nmanifest = "val"', "clean 1: manifest 'val': "),
        ('models = ["a"]\nname = "a"', "not TOML: "),
    ],
)
def test_impossible_cleanings_are_refused(refusal, lines, words):
    assert refusal(f"{ROUND}{CLEAN}{lines}\n").startswith(words)


def test_a_cleaning_is_not_called_as_its_list_of_suspects(refusal):
    taken = f'{ROUND}[[clean]]\nname = "dropped"\nmodels = ["a"]\n'
    assert refusal(taken) == "clean 1: name 'dropped': so is the table called of what was dropped"


def test_a_cleaning_may_not_share_a_rounds_name(refusal):
    assert refusal(ROUND + '[[clean]]\nname = "a"\nmodels = ["a"]\n').startswith("names must differ: a stands")


@pytest.mark.parametrize(
    ("field", "value"),
    [(field, value) for field in ("init", "manifest", "models") for value in recipe.RESERVED],
)
def test_each_field_has_a_vocabulary_of_its_own(tmp_path, field, value):
    allowed = {"init": ("imagenet", "random", "newest"), "manifest": ("train", "balanced"), "models": ("newest",)}
    path = tmp_path / "words.toml"
    written = f'["{value}"]' if field == "models" else f'"{value}"'
    path.write_text((ROUND if field != "models" else ROUND + '[[clean]]\nname = "c"\n') + f"{field} = {written}\n")
    if value in allowed[field]:
        read(path)
    else:
        with pytest.raises(InputError, match=rf"{field} '{value}': is "):
            read(path)


@pytest.mark.parametrize("kind", ["round", "clean"])
@pytest.mark.parametrize("word", recipe.RESERVED)
def test_no_step_is_called_as_one_of_the_words(refusal, kind, word):
    fields = 'models = ["a"]\n' * (kind == "clean")
    assert f"name {word!r}: no step can be called so" in refusal(f'{ROUND}[[{kind}]]\nname = "{word}"\n{fields}')


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ('[[round]]\nname = "b"\nmanifest = "a"\n', "round b: manifest 'a': is a [[round]], and leaves no manifest"),
        ('[[round]]\nname = "b"\ninit = "c"\n', "round b: init 'c': is a [[clean]] step, and leaves no weights"),
        ('[[clean]]\nname = "d"\nmodels = ["a", "c"]\n', "clean d: models 'c': is a [[clean]] step, and no model"),
    ],
)
def test_what_names_a_step_of_the_other_kind_is_refused(refusal, lines, why):
    assert why in refusal(ROUND + '[[clean]]\nname = "c"\nmodels = ["a"]\n' + lines)


def test_a_manifest_may_be_a_step_of_a_recipe_whose_name_has_an_apostrophe():
    assert Round(name="a", manifest="o'brien's best/reliable", init="o'brien's best/b")


def test_a_triplet_round_needs_a_cosine_head_and_something_to_train():
    for fields in ({"head": "linear"}, {"head": "cosine", "freeze": "all"}):
        with pytest.raises(ValidationError, match="loss 'triplet' needs head 'cosine'"):
            Round(name="a", loss="triplet", **fields)
