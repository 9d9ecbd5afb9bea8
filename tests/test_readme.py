"""The README's Python runs, top to bottom, and the commands it names exist."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_python_runs() -> None:
    namespace: dict[str, object] = {}
    found = blocks("python")
    assert found
    for block in found:
        exec(compile(block, "README.md", "exec"), namespace)


def test_equivalent_lines_are_equivalent() -> None:
    import torch

    import hsm_kernels as hsm

    namespace: dict[str, object] = {"torch": torch}
    exec(next(block for block in blocks("python") if "def equivalent" in block), namespace)
    rnn = hsm.LSTM(3, 4, dtype=torch.float64)
    x = torch.randn(7, 2, 3, dtype=torch.float64)
    state = torch.randn(2, 1, 2, 4, dtype=torch.float64)
    starts = torch.rand(7, 2) < 0.3
    output, (h_n, c_n) = rnn(x, tuple(state), reset_mask=starts, truncated_bptt_steps=3)
    w_ih, w_hh, b_ih, b_hh = rnn.parameters()
    plain = namespace["equivalent"](x, state[0, 0], state[1, 0], w_ih, w_hh, b_ih + b_hh, starts, 3)  # type: ignore[operator]
    torch.testing.assert_close((output, h_n[0], c_n[0]), plain)
    grads = [torch.autograd.grad(result.sum(), list(rnn.parameters())) for result in (output, plain[0])]
    torch.testing.assert_close(*grads)


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(
        re.findall(r"\bmake ([a-z][a-z-]*)", "".join(blocks("bash")) + " ".join(re.findall(r"`(make .*?)`", README)))
    )
    assert {"demo", "test"} <= named
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in named)


def test_files_it_names_exist() -> None:
    for path in re.findall(r"\]\((?!http)([^)#]+)\)|`((?:hsm_kernels|csrc|benchmarks|examples)/[\w./-]+)`", README):
        name = path[0] or path[1]
        assert (ROOT / name).exists(), name
