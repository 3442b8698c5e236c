"""Cards show what was measured and nothing else, survive hostile names, and never replace what a person wrote."""

import copy
import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_shapley.publishing.card_data import ShapleyModelCard, ShapleyModelCardData
from hf_shapley.publishing.card_results import merge_results
from hf_shapley.publishing.card_texts import escape_markdown, format_number, numbers_in_card
from hf_shapley.publishing.hub import _add_tags
from hf_shapley.publishing.model_card import MARKER, RECORD, render_model_card, results_of_card, write_model_card

markdown_it = pytest.importorskip("markdown_it")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def results():
    return {
        "model_name": "shapley-vit-tiny-cifar10",
        "summary": "Tells ten kinds of things apart.",
        "game": "the classifier's own, absent patches dropped",
        "license": "apache-2.0",
        "base_model": "google/vit-base-patch16-224",
        "dataset": {"name": "CIFAR-10", "id": "uoft-cs/cifar10", "split": "test", "revision": "0b2714987fa478483af9"},
        "labels": ["airplane", "sports car"],
        "metrics": [
            {
                "group": "Accuracy",
                "type": "accuracy",
                "name": "Accuracy",
                "value": 0.97213,
                "interval": [0.9611, 0.98],
                "confidence": 0.95,
                "better": "higher",
                "settings": {"images": 2000, "seeds": [0, 1, 2]},
            },
            {"group": "Faithfulness", "type": "error_ratio", "value": 0.00712, "settings": {"coalitions": 4096}},
            {"group": "Faithfulness", "type": "interaction_share", "name": "Interaction share", "value": -1.5e-5},
        ],
        "training": {"epochs": 60, "learning_rate": 3e-4, "ramped": True, "optimizer": {"name": "adamw"}},
        "environment": {"torch": "2.13.0"},
        "limits": ["Only for pictures of 32 x 32 pixels."],
        "command": "python examples/cifar10.py --epochs 60",
    }


def leaves(value):
    """Every scalar of a JSON value, keys included."""
    if isinstance(value, dict):
        return [leaf for key, entry in value.items() for leaf in [key, *leaves(entry)]]
    if isinstance(value, list):
        return [leaf for entry in value for leaf in leaves(entry)]
    return [value]


def unsupported_numbers(card, results):
    """Numbers that a card claims and its result file does not hold."""
    supported = set()
    for leaf in leaves(results):
        if isinstance(leaf, str):
            supported.update(numbers_in_card(escape_markdown(leaf)))
        elif isinstance(leaf, int | float) and not isinstance(leaf, bool):
            supported.add(format_number(leaf))
    return [number for number in numbers_in_card(card) if number not in supported]


def rendered_html(card):
    """The card's body as CommonMark with tables."""
    body = re.sub(r"\A---\n.*?\n---\n", "", card, flags=re.DOTALL)
    return markdown_it.MarkdownIt("commonmark").enable("table").render(body)


# ---- numbers


def test_a_card_claims_only_its_results_numbers(results):
    """A card claims no number that its results do not hold."""
    card = render_model_card(results, model_id="user/model", source="results.json")
    assert unsupported_numbers(card, results) == []
    assert {"0.9721", "0.9611", "0.98", "0.95", "2000", "4096", "0.00712", "-1.5e-05"} <= set(numbers_in_card(card))


def test_changed_and_invented_numbers_are_found(results):
    """A number in a card that was changed or made up is found."""
    card = render_model_card(results, model_id="user/model")
    assert unsupported_numbers(card.replace("0.9721", "0.9921"), results) == ["0.9921"]
    assert unsupported_numbers(card + "\nTwice as good, 99.5 % of the time, error -3e-4 or .7.\n", results) == (
        ["99.5", "-3e-4", ".7"]
    )


@pytest.mark.parametrize("card_path", sorted(ROOT.glob("model_cards/*.md")), ids=lambda path: path.stem)
def test_released_cards_hold_their_result_files_numbers(card_path):
    """Released cards name their result file, and hold no number that is not in it."""
    text = card_path.read_text(encoding="utf-8")
    source = re.search(r"<!-- Results: (.*?) -->", text)
    assert source, "a released card names its result file"
    results = json.loads((ROOT / source[1]).read_text(encoding="utf-8"))
    assert unsupported_numbers(text, results) == []
    claimed = [result.metric_value for result in ShapleyModelCard(text).data.eval_results or []]
    assert claimed and set(claimed) <= {leaf for leaf in leaves(results) if isinstance(leaf, int | float)}


@pytest.mark.parametrize(
    "value, text",
    [
        (0, "0"),
        (2000, "2000"),
        (1.0, "1"),
        (0.97213, "0.9721"),
        (-0.5, "-0.5"),
        (12345.6, "12346"),
        (3e-4, "0.0003"),
        (1.23456e-7, "1.235e-07"),
        (1e20, "1e+20"),
    ],
)
def test_numbers_are_written_with_four_significant_digits(value, text):
    assert format_number(value) == text
    assert numbers_in_card(f"| {text} |") == [text]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_card_shows_no_nan(results, value):
    results["metrics"][0]["value"] = value
    with pytest.raises(ValueError, match="finite numbers only"):
        render_model_card(results, model_id="m")


@pytest.mark.parametrize("value", [True, "0.9", None])
def test_a_value_that_is_no_number_is_refused(value):
    with pytest.raises(TypeError, match="must be an int or a float"):
        format_number(value)


def test_numbers_outside_of_prose_are_no_claims():
    """Numbers in code, comments, addresses, names and metadata are not claims."""
    card = (
        "---\nvalue: 1\n---\n<!-- 2 -->\n```python\nx = 3\n```\n`4` [a](b5) https://a.org/6 arXiv:2512.14354 v7 8.9.1 "
        "x10\n````\n```\n11\n````\n12\n"
    )
    assert numbers_in_card(card) == ["12"]


# ---- metadata


def test_the_hub_reads_the_results_back(results):
    data = ModelCard(render_model_card(results, model_id="user/model")).data
    accuracy = data.eval_results[0]
    assert (data.model_name, data.license, data.base_model) == (
        "shapley-vit-tiny-cifar10",
        "apache-2.0",
        "google/vit-base-patch16-224",
    )
    assert (accuracy.task_type, accuracy.dataset_type, accuracy.dataset_name, accuracy.dataset_split) == (
        "image-classification",
        "uoft-cs/cifar10",
        "CIFAR-10",
        "test",
    )
    assert [result.metric_value for result in data.eval_results] == [0.97213, 0.00712, -1.5e-5]
    assert accuracy.metric_args == {"interval": [0.9611, 0.98], "confidence": 0.95, "images": 2000, "seeds": [0, 1, 2]}


def test_the_hub_can_find_and_run_the_model(results):
    data = ModelCard(render_model_card(results, model_id="user/model")).data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "image-classification")
    assert {"hf_shapley", "shapley"} <= set(data.tags)


def test_metadata_given_by_the_user_wins(results):
    data = ShapleyModelCardData.from_results(results, license="mit", tags=["digits"])
    read = ShapleyModelCard(render_model_card(results, model_id="m", data=data)).data
    assert (read.license, read.tags) == ("mit", ["digits"])


def test_a_loaded_card_is_saved_unchanged(results, tmp_path):
    card = render_model_card(results, model_id="user/model")
    (tmp_path / "README.md").write_text(card)
    loaded = ShapleyModelCard.load(tmp_path / "README.md")
    assert str(loaded) == card
    assert isinstance(loaded.data, ShapleyModelCardData)


@pytest.mark.parametrize(
    "header",
    ["a: !!python/object/apply:os.getcwd []", "tags: [", "tags: 5", "a: &a [*a, *b]"],
    ids=lambda text: text[:8],
)
def test_metadata_that_cannot_be_read_are_named(header, tmp_path):
    """The parser's own errors, which say neither what is wrong nor where, reach nobody."""
    path = tmp_path / "README.md"
    path.write_text(f"---\n{header}\n---\n# Mine\n")
    for read in (lambda: ShapleyModelCard.load(path), lambda: _add_tags(path, ["toy"])):
        with pytest.raises(ValueError, match="metadata of the card"):
            read()
    assert path.read_text().endswith("# Mine\n")


# ---- text


def test_equal_results_give_equal_cards_and_stay(results):
    """The same results give the same card and are not changed."""
    before = copy.deepcopy(results)
    cards = {render_model_card(results, model_id="user/model", picture="a.png", source="r.json") for _ in range(2)}
    assert len(cards) == 1
    assert results == before


def test_every_given_entry_is_shown(results):
    card = render_model_card(results, model_id="user/model", picture="figures/example.png", source="r.json")
    for expected in (
        "# shapley-vit-tiny-cifar10\n",
        "Tells ten kinds of things apart.",
        "Fine-tuned from google/vit-base-patch16-224. Evaluated on CIFAR-10 (split test, ",
        "Labels: airplane, sports car.",
        "### Accuracy\n",
        "| Accuracy (higher is better) | 0.9721 | 0.9611 to 0.98 (at 0.95) | images: 2000, seeds: 0 / 1 / 2 |",
        "| error\\_ratio | 0.00712 |  | coalitions: 4096 |",
        "epochs: 60, learning rate: 0.0003, ramped: yes, optimizer: (name: adamw).",
        "- Only for pictures of 32 x 32 pixels.",
        "```bash\npython examples/cifar10.py --epochs 60\n```",
        "Measured with torch: 2.13.0.",
        "](figures/example.png)",
        'name = "user/model"',
        "trust_remote_code=True",
        "<!-- Results: r.json -->",
        "arXiv:2512.14354",
        "interaction share above",
    ):
        assert expected in card


def test_tables_of_one_group_are_one_table(results):
    html = rendered_html(render_model_card(results, model_id="user/model"))
    assert html.count("<table>") == 2
    assert html.count("<tr>") == 2 + 3


def test_a_card_says_whose_game_is_explained(results):
    """And keeps it; without that entry it claims nothing of it."""
    card = render_model_card(results, model_id="user/model")
    assert "Whose game it is: the classifier's own, absent patches dropped." in card
    assert results_of_card(card)["game"] == results["game"]
    del results["game"]
    assert "Whose game" not in render_model_card(results, model_id="user/model")


def test_an_unevaluated_models_card_says_so():
    """A model that was not evaluated gets a card that says so and claims no number."""
    card = render_model_card({"model_name": "fresh"}, model_id="fresh")
    assert "No evaluation results were given" in card
    assert "How to reproduce" not in card
    assert numbers_in_card(card) == []
    assert ModelCard(card).data.eval_results is None


def test_many_labels_are_cut_short():
    card = render_model_card({"model_name": "m", "labels": [f"kind {i}" for i in range(1000)]}, model_id="m")
    assert "kind 19, and the others in `config.json`." in card
    assert "kind 20" not in card


def test_the_example_in_the_card_is_python(results):
    card = render_model_card(results, model_id='a"; import os; "', source="r.json")
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    assert "import os" not in re.sub(r'".*"', "", code)
    compile(code, "card", "exec")


# ---- injection

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[click](javascript:alert(1))",
    "![x](https://evil.example/x.png)",
    "a | b | c",
    "x\n\n# Heading\n\n- item",
    "`code` ``` fence",
    "**bold** _it_ ~~gone~~",
    "https://evil.example www.evil.example me@evil.example",
    "- item",
    "1. item",
    "===",
    "{{ 7 * 7 }}{% raw %}",
    "--> <b>out of the comment</b>",
    "\u202eright to left\u200b",
    "---\nlicense: other\n---",
    "&lt;b&gt;",
]


def planted(results, text):
    """Results with a hostile text wherever a text may stand."""
    results["model_name"] = results["summary"] = results["base_model"] = text
    results["dataset"] = dict.fromkeys(("name", "id", "split", "revision", "config"), text)
    results["labels"] = results["limits"] = [text]
    results["metrics"][0] |= {"group": text, "name": text, "settings": {text: text, "list": [text]}}
    results["training"] = results["environment"] = {text: {text: text}}
    results["command"] = f"echo {text}"
    return results


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_change_no_structure_of_cards(results, text):
    """Hostile texts show as themselves, and change neither structure, addresses nor metadata of a card."""
    benign = rendered_html(render_model_card(planted(copy.deepcopy(results), "x"), model_id="x", source="x"))
    card = render_model_card(planted(results, text), model_id=text, source=text)
    html = rendered_html(card)
    tags = re.compile(r"<(/?\w+)")
    without_comments = [re.sub(r"<!--.*?-->", "", page, flags=re.DOTALL) for page in (benign, html)]
    assert tags.findall(without_comments[0]) == tags.findall(without_comments[1])
    assert "49" not in numbers_in_card(card) and "javascript:" not in "".join(
        re.findall(r'(?:href|src)="(.*?)"', html)
    )
    data = ModelCard(card).data
    assert data.license == "apache-2.0"
    assert len(data.eval_results) == 3


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.text(max_size=40))
def test_an_escaped_text_reads_as_the_text_itself(text):
    tokens = markdown_it.MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(escape_markdown(text))
    shown = "".join(child.content for token in tokens if token.children for child in token.children)
    visible = "".join(c for c in " ".join(text.split()) if c.isprintable() or c == " ")
    kept = "".join(c for c in shown if c.isprintable() or c == " ")
    assert {token.type for token in tokens} <= {"paragraph_open", "inline", "paragraph_close"}
    assert kept.strip() == visible.strip()


def test_bare_addresses_do_not_become_links():
    escaped = escape_markdown("http://a.b WWW.a.b a@b.c")
    assert escaped == "http&colon;//a.b WWW&period;a.b a&commat;b.c"


@pytest.mark.parametrize(
    "picture, address",
    [
        ("my picture (1).png", "my%20picture%20%281%29.png"),
        ("a.png) <script>", "a.png%29%20%3Cscript%3E"),
        ("https://a.org/b c.png?x=1", "https://a.org/b%20c.png?x=1"),
        ("javascript:alert(1)", "javascript%3Aalert%281%29"),
    ],
)
def test_a_picture_address_cannot_end_early(results, picture, address):
    assert f"]({address})\n" in render_model_card(results, model_id="m", picture=picture)


@pytest.mark.parametrize("picture", ["/etc/picture.png", "../../picture.png"])
def test_a_picture_outside_of_the_repository_is_refused(results, picture):
    with pytest.raises(ValueError, match="relative to the card"):
        render_model_card(results, model_id="m", picture=picture)


# ---- refusals


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_name": ""}, "must have a `model_name`"),
        ({"dataset": "CIFAR-10"}, r"`results\['dataset'\]` must be a dict, got str"),
        ({"labels": {"0": "cat"}}, r"`results\['labels'\]` must be a list, got dict"),
        ({"metrics": [{"type": "accuracy"}]}, "it lacks value"),
        ({"metrics": [{"value": 1, "type": "a b"}]}, "must have a `type` of letters"),
        ({"metrics": [{"value": 1, "type": "a", "better": "bigger"}]}, "'higher' or 'lower'"),
        ({"metrics": [{"value": 1, "type": "a", "interval": [0, 1]}]}, "must state its `confidence`"),
        ({"metrics": [{"value": 1, "type": "a", "interval": [0, 1], "confidence": 95}]}, "between 0 and 1"),
        ({"metrics": [{"value": 1, "type": "a", "interval": [1, 0], "confidence": 0.95}]}, "low <= high"),
    ],
)
def test_malformed_results_are_refused(results, change, message):
    with pytest.raises(ValueError, match=message):
        render_model_card({**results, **change}, model_id="m")


def test_a_path_in_place_of_results_is_refused():
    with pytest.raises(TypeError, match="load the JSON file first"):
        render_model_card("results.json", model_id="m")


# ---- reading back


@pytest.mark.parametrize("text", HOSTILE)
def test_a_card_gives_back_the_results_it_shows(results, text):
    """Labels apart, which are the model's; hostile texts too, and no text passes for a card's results."""
    planted(results, text)
    results["command"] = f"{text}\n{RECORD}{{}} -->"
    card = render_model_card(results, model_id="m")
    del results["labels"]
    assert results_of_card(card) == results
    assert render_model_card(results_of_card(card), model_id="m") == render_model_card(results, model_id="m")


@pytest.mark.parametrize("change", [(MARKER, ""), (RECORD, RECORD + "["), (RECORD, RECORD + "[] -->\n")])
def test_a_card_that_was_changed_gives_back_nothing(results, change):
    assert results_of_card(render_model_card(results, model_id="m").replace(*change)) == {}


def test_merged_results_hold_the_metrics_of_both(results):
    """The later value counts where both have one; what only one says of the model stays."""
    (first, second, third), other = results["metrics"], {"name": "Other", "split": "test"}
    again = {**second, "value": 0.5}
    later = {"model_name": "", "metrics": [again], "dataset": results["dataset"], "limits": ["Another."]}
    merged = merge_results(results, later)
    assert merged == {**results, "metrics": [first, again, third], "limits": [*results["limits"], "Another."]}
    merged = merge_results(results, {**later, "dataset": other, "model_name": "new"})
    assert [metric["value"] for metric in merged["metrics"]] == [0.97213, 0.00712, -1.5e-5, 0.5]
    assert merged["model_name"] == "new"
    card = render_model_card(merged, model_id="m")
    assert [found.dataset_name for found in ModelCard(card).data.eval_results] == ["CIFAR-10"] * 3 + ["Other"]
    assert "data: Other / test" in card
    assert unsupported_numbers(card, merged) == []


# ---- writing


def test_cards_are_written_into_folders_and_updated(results, tmp_path):
    """A card is written into a folder and updated there."""
    card = render_model_card(results, model_id="m")
    assert write_model_card(tmp_path, card)
    assert (tmp_path / "README.md").read_text() == card
    results["summary"] = "Newer."
    newer = render_model_card(results, model_id="m")
    assert write_model_card(tmp_path, ShapleyModelCard(newer))
    assert (tmp_path / "README.md").read_text() == newer
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_a_card_that_somebody_wrote_is_kept(results, tmp_path, caplog):
    (tmp_path / "README.md").write_text("# My own words")
    assert not write_model_card(tmp_path, render_model_card(results, model_id="m"))
    assert (tmp_path / "README.md").read_text() == "# My own words"
    assert "Kept the existing card" in caplog.text


def test_deleting_the_marker_makes_a_card_ones_own(results, tmp_path):
    card = render_model_card(results, model_id="m")
    (tmp_path / "README.md").write_text(card.replace(MARKER, ""))
    assert not write_model_card(tmp_path, card)
    assert MARKER not in (tmp_path / "README.md").read_text()


def test_an_empty_file_is_nobodys_card(results, tmp_path):
    (tmp_path / "README.md").write_text("\n")
    assert write_model_card(tmp_path / "README.md", render_model_card(results, model_id="m"))


def test_missing_folders_are_made(results, tmp_path):
    assert write_model_card(tmp_path / "new" / "card.md", render_model_card(results, model_id="m"))
    assert (tmp_path / "new" / "card.md").is_file()


def test_only_generated_cards_are_written(tmp_path):
    with pytest.raises(ValueError, match="render it with `render_model_card`"):
        write_model_card(tmp_path, "# text")
