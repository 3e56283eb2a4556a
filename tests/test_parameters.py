"""One text that means several things: split as in a shell, or refused where it could be meant in two ways."""

import re

import pytest

from aliprod import InputError, first_line, parameters, recipe


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("", {}),
        ("lr=3e-4 epochs=2", {"lr": 3e-4, "epochs": 2}),
        ("  lr = 3e-4\nepochs =2 ", {"lr": 3e-4, "epochs": 2}),
        ("samples_per_class=[2, 5] epochs=2", {"samples_per_class": [2, 5], "epochs": 2}),
        ("level_weights = { 3 = 0.6, 4 = 1.0 }", {"level_weights": {"3": 0.6, "4": 1.0}}),
        ("x = [\n1,\n[2, 3]\n]", {"x": [1, [2, 3]]}),
        ('select_list="a folder/b.csv"', {"select_list": "a folder/b.csv"}),
        ("manifest='my table.csv' epochs=1", {"manifest": "my table.csv", "epochs": 1}),
        ('"select_list=a folder/b.csv" epochs=1', {"select_list": "a folder/b.csv", "epochs": 1}),
        ("'samples_per_class=[2, 5]'", {"samples_per_class": [2, 5]}),
        ('select_list=work/"a b".csv', {"select_list": "work/a b.csv"}),
        (r"select_list=a\ b.csv", {"select_list": "a b.csv"}),
        ('init="Lay\'s"', {"init": "Lay's"}),
        ("init='say \"x\"'", {"init": 'say "x"'}),
        (r'init="say \"x\""', {"init": 'say "x"'}),
        ("init='a = [b' lr=1", {"init": "a = [b", "lr": 1}),
        ("init=s3://b/x?y=1#2", {"init": "s3://b/x?y=1#2"}),
        ("init=v1.1 manifest=v1/reliable", {"init": "v1.1", "manifest": "v1/reliable"}),
        ("init=$HOME/`x`", {"init": "$HOME/`x`"}),
        ("seed=1#2", {"seed": "1#2"}),
        ("lr=1 lr=2 init=", {"lr": 2, "init": ""}),
        ("compile=true init=''", {"compile": True, "init": ""}),
    ],
)
def test_fields_are_as_in_toml_or_as_in_a_shell(text, fields):
    assert parameters.fields("overrides", text) == fields


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lr", "'lr' is not of the form field=value"),
        ("=3", "'=3' is not of the form field=value"),
        ("manifest=my table.csv", "'table.csv' is not of the form field=value; what holds spaces"),
        ("init=a= b", "'init=a= ' could be one field or two"),
        ("lr= epochs=2", "'lr=epochs=' could be one field or two"),
        ("init = a = b", "'=b' is not of the form field=value"),
        ("init=a[1, 2]", "'a[1, 2]' could be one word or several"),
        ("init=Lay's", '"init=Lay\'s": a quotation mark or a bracket is not closed; what holds spaces'),
        ('init="a b lr=1', "a quotation mark or a bracket is not closed"),
        ("samples_per_class=[2, 5 lr=1", "a quotation mark or a bracket is not closed"),
        ("init=a\\", "a quotation mark or a bracket is not closed"),
    ],
)
def test_what_could_be_meant_in_two_ways_is_refused(text, words):
    with pytest.raises(InputError, match=rf"^overrides:? .*{re.escape(words)}"):
        parameters.fields("overrides", text)


def test_a_round_takes_values_with_spaces_and_names_the_wrong_ones(row):
    changed = recipe.override(row, "samples_per_class=[2, 5] level_weights={ 3 = 0.6 } select_list='a b.csv'")
    assert (changed.samples_per_class, changed.level_weights) == ((2, 5), {"3": 0.6})
    assert changed.select_list == "a b.csv"
    with pytest.raises(InputError, match="overrides: samples_per_class .*5.*2.*: least must not exceed most"):
        recipe.override(row, "samples_per_class=[5, 2]")


def test_a_path_with_spaces_needs_no_quotes_where_it_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a folder").mkdir()
    (tmp_path / "Lay's.toml").touch()
    assert parameters.paths("models", "a folder") == ["a folder"]
    assert parameters.paths("recipe", "Lay's.toml") == ["Lay's.toml"]
    assert parameters.paths("models", "'a folder' newest") == ["a folder", "newest"]
    assert parameters.paths("models", "no folder") == ["no", "folder"]
    assert parameters.paths("models", "") == [""] and parameters.paths("models", "x " * 5000) == ["x"] * 5000
    assert parameters.words("classes", "-5 'a folder' 1e5 00012") == ["-5", "a folder", "1e5", "00012"]
    with pytest.raises(InputError, match=r"models \"no Lay's\": No closing quotation"):
        parameters.paths("models", "no Lay's")


@pytest.mark.parametrize(("error", "line"), [("", "ValueError"), ("\n\n a\nb", "a"), (" \n", "ValueError"), ("x", "x")])
def test_every_error_has_a_first_line(error, line):
    assert first_line(ValueError(error)) == line
