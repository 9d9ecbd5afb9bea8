"""The pages in docs/ run top to bottom, what they call equal is equal, and their picture is up to date."""

import importlib.util
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from rnn_helpers import gradients, leaf, make_pair, random_state, tensors
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import hsm_kernels as hsm

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md"))}
PAGE = PAGES["boundaries.md"]
STEPS, BATCH, FEATURES, HIDDEN = 6, 2, 3, 4


def run(name: str) -> dict[str, Any]:
    """Runs every Python block of a page in one namespace; line numbers in errors are those of the page."""
    namespace: dict[str, Any] = {}
    text = PAGES[name]
    found = list(re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    assert found, f"{name} has no Python"
    for block in found:
        lines_above = text[: block.start(1)].count("\n")
        exec(compile("\n" * lines_above + block[1], str(DOCS / name), "exec"), namespace)
    return namespace


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What boundaries.md defines."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("page"))
        return run("boundaries.md")


@pytest.mark.parametrize("name", PAGES)
def test_python_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # for what the page saves
    run(name)


@pytest.mark.parametrize("name", PAGES)
def test_every_block_has_a_language(name: str) -> None:
    """A block without one would look like Python and never run."""
    fences = re.findall(r"^```(.*)$", PAGES[name], re.MULTILINE)
    assert set(fences[::2]) <= {"python", "bash"}
    assert set(fences[1::2]) == {""}


@pytest.mark.parametrize("name", PAGES)
def test_links_and_files_exist(name: str) -> None:
    text = re.sub(r"^```.*?^```", "", PAGES[name], flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = DOCS / (path or name)
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
    for path in re.findall(r"`((?:hsm_kernels|csrc|benchmarks|docs|examples|tests)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("name", PAGES)
def test_names_in_the_text_exist(name: str) -> None:
    for dotted in set(re.findall(r"\bhsm((?:\.\w+)+)", PAGES[name])):
        value: Any = hsm
        for part in dotted[1:].split("."):
            value = getattr(value, part)


# The pairs: both functions of one give the same results and the same gradients.


def edges(*set_ones: tuple[int, int]) -> Tensor:
    mask = torch.zeros(STEPS, BATCH, dtype=torch.bool)
    for t, n in set_ones:
        mask[t, n] = True
    return mask


def make_input() -> Tensor:
    return torch.randn(STEPS, BATCH, FEATURES, dtype=torch.float64)


# Sequence 0 has episodes that begin at steps 0 and 3; sequence 1 continues one, and has another from step 4 on.
STARTS = edges((0, 0), (3, 0), (4, 1))

#: What the functions of a pair take after the module and the state: the input, then the rest.
PAIRS: dict[str, Callable[[], tuple[Tensor, ...]]] = {
    "episode_starts": lambda: (make_input().transpose(0, 1).flatten(0, 1), STARTS.t().flatten().double()),
    "get_states": lambda: (make_input().flatten(0, 1), STARTS.flatten().double()),
    "is_init": lambda: (make_input().transpose(0, 1), STARTS.t()[..., None]),
    "chunks": lambda: (make_input(), 4),  # the last chunk is shorter
    "stream": lambda: (make_input().unflatten(0, (3, 2)), edges((0, 1), (1, 0), (2, 0), (2, 1))[:3]),
    "burn_in": lambda: (make_input(), 2),
}


def test_every_pair_is_tested() -> None:
    assert set(re.findall(r"^def (\w+)_before\(", PAGE, re.MULTILINE)) == set(PAIRS)
    assert set(re.findall(r"^def (\w+)_after\(", PAGE, re.MULTILINE)) == set(PAIRS)


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_agree(name: str, page: dict[str, Any], backend: str) -> None:
    options = {"num_layers": 2, "batch_first": name == "is_init", "dtype": torch.float64}
    ours, theirs = make_pair("LSTM", FEATURES, HIDDEN, **options)
    x, *rest = PAIRS[name]()
    x, state = leaf(x), leaf(random_state(theirs, BATCH, torch.float64))
    results = []
    for rnn, function in ((theirs, page[f"{name}_before"]), (ours, page[f"{name}_after"])):
        result = function(rnn, x, state, *rest)
        results.append([*tensors(result), *gradients(result, [x, state, list(rnn.parameters())])])
    before, after = results
    assert any(grad.any() for grad in before[3:])
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-11)


# The tables of other libraries' words: every line of code in them turns an example into what it should.


def words(cell: str) -> list[str]:
    return [code.replace("\\|", "|") for code in re.findall(r"`([^`]+)`", cell)]


def table_rows() -> dict[str, str]:
    """First column -> last column, of the tables that end in our words."""
    rows = {}
    for table in re.findall(r"^\|.*\| in our words \|\n\|[-|]+\|\n((?:\|.*\|\n)+)", PAGE, re.MULTILINE):
        for line in table.splitlines():
            cells = re.split(r"(?<!\\)\|", line)[1:-1]
            rows[cells[0].strip()] = cells[-1]
    return rows


def statements(cell: str) -> list[str]:
    """The code of a cell that does something; the rest names arguments."""
    return [code for code in words(cell) if " = " in code or "(" in code]


Example = tuple[dict[str, Any], dict[str, Any]]  # the names given to a line, and those that it must make


def dones_example() -> Example:
    terminated, truncated = edges((2, 0)), edges((3, 1), (5, 1))
    first = torch.tensor([True, False])
    return {"terminated": terminated, "truncated": truncated, "first": first}, {
        "reset_mask": STARTS,
        "first": torch.tensor([False, True]),
    }


def next_step_example() -> Example:
    """Sequence 0: done at step 1, final observation at 2, a new episode from 3 on; and so on."""
    before = edges((STEPS - 2, 0))
    return {"dones": edges((1, 0), (2, 1)), "dones_before": before}, {"reset_mask": STARTS}


def rnn_example(**options: Any) -> dict[str, Any]:
    """A module of ours, its twin and what to call them with."""
    ours, theirs = make_pair("LSTM", FEATURES, HIDDEN, dtype=torch.float64)
    names = {"rnn": ours, "theirs": theirs, "x": make_input(), "hx": random_state(theirs, BATCH, torch.float64)}
    return names | {"L": STEPS, "N": BATCH, "b": 2, "k": 2} | options


def lengths_example(name: str) -> Example:
    lengths = torch.tensor([4, STEPS])
    given = rnn_example(**{name: lengths})
    packed = pack_padded_sequence(given["x"], lengths, enforce_sorted=False)
    output, hx_n = given["theirs"](packed, given["hx"])
    return given, {"output": pad_packed_sequence(output)[0], "hx_n": hx_n}


def packed_example() -> Example:
    given = rnn_example()
    given["packed"] = pack_padded_sequence(given["x"], torch.tensor([4, STEPS]), enforce_sorted=False)
    output, hx_n = given["theirs"](given["packed"])
    return given, {"output": output, "hx_n": hx_n}


def reaches(output: Tensor, x: Tensor) -> list[int]:
    """The steps of ``x`` that the gradient of ``output`` reaches."""
    (grad,) = torch.autograd.grad(output.sum(), x, retain_graph=True)
    return [t for t in range(x.size(0)) if grad[t].any()]


def truncated_example() -> Example:
    given = rnn_example(x=leaf(make_input()))
    output, hx_n = given["theirs"](given["x"], given["hx"])
    return given, {"output": output, "hx_n": hx_n, "reaches(output[-1], x)": [4, 5], "reaches(output[3], x)": [2, 3]}


def burn_in_example() -> Example:
    given = rnn_example(x=leaf(make_input()), at_b=edges((2, 0), (2, 1)))
    given["stored"] = given["hx"]
    output, hx_n = given["theirs"](given["x"], given["hx"])
    return given, {"output": output, "hx_n": hx_n, "reaches(output[2:], x)": [2, 3, 4, 5]}


def stateful_example() -> Example:
    given = rnn_example()
    output, hx_n = given["theirs"](given["x"])
    return given, {"output": output, "hx_n": hx_n, "stateful.state is None": True}


def learned_example() -> Example:
    given = rnn_example()
    zeros = torch.zeros(1, BATCH, HIDDEN, dtype=torch.float64)
    return given, {"hx": (zeros, zeros), "hx[0].requires_grad": True, "hx[1].requires_grad": True}


#: By the beginning of the first column.
EXAMPLES: dict[str, Callable[[], Example]] = {
    "`terminated`": dones_example,
    "the same with `NEXT_STEP`": next_step_example,
    "`dones`": lambda: ({"dones_beside_obs": STARTS.float()}, {"reset_mask": STARTS}),
    "`episode_starts`": lambda: (
        {"episode_starts": STARTS.t().flatten().float(), "N": BATCH, "L": STEPS},
        {"reset_mask": STARTS},
    ),
    "`is_init`": lambda: ({"is_init": STARTS.t()[..., None]}, {"reset_mask": STARTS.t()}),
    "`is_first`": lambda: ({"is_first": STARTS.t().float()}, {"reset_mask": STARTS.t()}),
    "`cu_seqlens`": lambda: (
        {"cu_seqlens": torch.tensor([0, 3, 6], dtype=torch.int32)},
        {"reset_mask": STARTS[:, 0]},
    ),
    "lengths of sequences": lambda: (
        {"row_lengths": torch.tensor([[3, 2], [3, 2]]), "L": STEPS},
        {"reset_mask": edges((0, 0), (0, 1), (2, 1), (3, 0))},
    ),
    "segment ids": lambda: (
        {
            "ids": torch.tensor([[1, 1, 1, 2, 2, 2], [5, 5, 5, 5, 0, 0]]).t(),
            "previous_ids": torch.tensor([0, 5]),
        },
        {"reset_mask": STARTS},
    ),
    "`seq_lens`": lambda: lengths_example("seq_lens"),
    "PackedSequence": packed_example,
    "`seq_lengths`": lambda: lengths_example("seq_lengths"),
    "`truncated_bptt_steps`": truncated_example,
    "`stateful=True`": stateful_example,
    "`train_burn_in=b`": lambda: (rnn_example(), {"detach_mask": edges((4, 0), (4, 1))}),
    "learned initial state": learned_example,
    "stored state": burn_in_example,
}


def test_every_word_is_tested() -> None:
    starts = list(EXAMPLES)
    assert [next((s for s in starts if word.startswith(s)), word) for word in table_rows()] == starts


@pytest.mark.parametrize("start", EXAMPLES)
def test_words(start: str) -> None:
    (cell,) = (cell for word, cell in table_rows().items() if word.startswith(start))
    given, wanted = EXAMPLES[start]()
    namespace = {"torch": torch, "hsm": hsm, "reaches": reaches} | given
    assert statements(cell)
    for code in statements(cell):
        exec(code, namespace)
    for name, value in wanted.items():
        made = eval(name, namespace)
        if isinstance(value, Tensor | tuple):
            torch.testing.assert_close(tensors(made), tensors(value))
        else:
            assert made == value


def test_bootstrap_values_use_the_old_episode(page: dict[str, Any]) -> None:
    critic, observations = page["critic"].to_torch(), page["observations"]
    wanted = []
    for t, n, begin in ((3, 1, 0), (5, 0, 2)):
        episode = torch.cat([observations[begin : t + 1, n], page["final_observations"][t, n][None]])
        wanted.append(page["value"](critic(episode)[0][-1]))
    torch.testing.assert_close(page["bootstrap"], torch.cat(wanted))


# The picture.


@pytest.fixture(scope="module")
def draw_edges() -> ModuleType:
    spec = importlib.util.spec_from_file_location("draw_edges", DOCS / "draw_edges.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def drawn(draw_edges: ModuleType, tmp_path: Path) -> Path:
    draw_edges.main([str(tmp_path / "edges.svg")])
    return tmp_path / "edges.svg"


def labels(path: Path) -> list[str]:
    """The text of a picture whose letters are paths: matplotlib leaves it in comments."""
    return re.findall(r"<!-- (.*?) -->", path.read_text(encoding="utf-8"))


def shapes(path: Path) -> dict[str, list[tuple[str, list[float]]]]:
    """Every named shape: its parts, each with its style and its coordinates."""
    named = {}
    for group in ET.parse(path).iter("{http://www.w3.org/2000/svg}g"):
        if " " in group.get("id", ""):
            named[group.get("id", "")] = [
                (part.get("style", ""), [float(number) for number in re.findall(r"-?[\d.]+", part.get("d", ""))])
                for part in group.iter("{http://www.w3.org/2000/svg}path")
            ]
    return named


def test_the_picture_is_what_the_script_draws(drawn: Path) -> None:
    kept = DOCS / "edges.svg"
    assert labels(kept) == labels(drawn)
    ours, theirs = shapes(kept), shapes(drawn)
    assert list(ours) == list(theirs)
    for name, parts in ours.items():
        assert [style for style, _ in parts] == [style for style, _ in theirs[name]], name
        for (_, kept_numbers), (_, drawn_numbers) in zip(parts, theirs[name], strict=True):
            assert kept_numbers == pytest.approx(drawn_numbers, abs=0.01), name


def test_the_picture_is_repeatable(draw_edges: ModuleType, drawn: Path, tmp_path: Path) -> None:
    draw_edges.main([str(tmp_path / "again.svg")])
    assert drawn.read_bytes() == (tmp_path / "again.svg").read_bytes()


def test_the_picture_has_a_white_background_and_every_edge(draw_edges: ModuleType) -> None:
    root = ET.parse(DOCS / "edges.svg").getroot()
    background = next(root.iter("{http://www.w3.org/2000/svg}path"))
    assert "fill: #ffffff" in background.get("style", "")
    _, _, width, height = map(float, root.get("viewBox", "").split())
    corners = [float(number) for number in re.findall(r"[\d.]+", background.get("d", ""))]
    assert (max(corners[::2]), max(corners[1::2])) == (width, height)
    assert [label for label in labels(DOCS / "edges.svg") if re.fullmatch(r"edge \d", label)] == [
        f"edge {edge}" for edge in range(draw_edges.STEPS)
    ]


def test_the_picture_shows_what_happens(draw_edges: ModuleType) -> None:
    """The steps and edges of the picture, run: which values and which gradients cross where."""
    steps, length = draw_edges.STEPS, draw_edges.LENGTH
    arrows = shapes(DOCS / "edges.svg")
    masks = {name: torch.zeros(steps, 1, dtype=torch.bool) for name in ("reset_mask", "detach_mask")}
    masks["reset_mask"][draw_edges.RESET] = masks["detach_mask"][draw_edges.DETACH] = True
    rnn = hsm.GRU(1, 1, bidirectional=True, dtype=torch.float64)
    x = torch.randn(steps, 1, 1, dtype=torch.float64, requires_grad=True)

    def states(input: Tensor) -> Tensor:
        return rnn(input, lengths=torch.tensor([length]), **masks)[0]

    for direction, name in enumerate(("forward", "reverse")):
        for edge in range(1, length):
            before, after = (edge - 1, edge) if direction == 0 else (edge, edge - 1)
            entered = states(x)[after, 0, direction]
            changed = x.detach().clone()
            changed[before] += 1
            value_crosses = bool(entered != states(changed)[after, 0, direction])
            gradient_crosses = bool(torch.autograd.grad(entered, x)[0][before])
            arrow = f"edge {edge} {name}"
            assert value_crosses == (f"{arrow} value head" in arrows), arrow
            assert gradient_crosses == (f"{arrow} gradient head" in arrows), arrow
            assert value_crosses != (f"{arrow} value bar" in arrows), arrow
