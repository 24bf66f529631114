import argparse

import pytest

from explainer.commands.arguments import name_list


def test_names_with_commas_stand_in_quotes():
    assert name_list("cat, dog") == ["cat", "dog"]
    assert name_list('"tench, Tinca tinca", goldfish,"a ""b"", c"') == ["tench, Tinca tinca", "goldfish", 'a "b", c']
    assert name_list(["a,b"]) == ["a,b"]


@pytest.mark.parametrize("value", ["", ",", " , "])
def test_no_name_at_all_is_refused(value):
    """An empty variable of a shell: without this, nothing would be explained, and the command would succeed."""
    with pytest.raises(argparse.ArgumentTypeError, match="at least one name"):
        name_list(value)
