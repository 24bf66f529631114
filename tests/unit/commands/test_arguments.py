from explainer.commands.arguments import name_list


def test_names_with_commas_stand_in_quotes():
    assert name_list("cat, dog") == ["cat", "dog"]
    assert name_list('"tench, Tinca tinca", goldfish,"a ""b"", c"') == ["tench, Tinca tinca", "goldfish", 'a "b", c']
    assert name_list(["a,b"]) == ["a,b"]
