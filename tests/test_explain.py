"""What `explain` says of a call on the CPU."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import hsm_kernels as hsm

pytestmark = pytest.mark.requires_library


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


CALLS = {
    "as they lie": (hsm.GRU(8, 8), torch.zeros(1, 1, 8), "1 thread of 2, as there is too little work for more"),
    "a cell": (hsm.LSTMCell(8, 8), torch.zeros(8), "weights are read as they lie"),
    "one step": (hsm.LSTM(8, 8), torch.zeros(1, 9, 8), "packed block by block as they are used"),
    "a short call": (hsm.GRU(8, 8), torch.zeros(5, 3, 8), "W_hh packed once for all steps; the input of 5 of 5 steps"),
    "few rows": (hsm.LSTM(512, 512), torch.zeros(2, 9, 512), "too little work to pay for packing"),
    "one sequence": (hsm.GRU(256, 256), torch.zeros(20, 1, 256), "as it is used, W_hh read as it lies"),
    "a long call": (hsm.LSTM(64, 64), torch.zeros(999, 8, 64), "share hidden units|share sequences"),
    "batch first": (hsm.LSTM(64, 64, batch_first=True), torch.zeros(8, 999, 64), "of 999 steps"),
    "many sequences": (hsm.GRU(64, 64), torch.zeros(2, 5000, 64), "of 5000 sequences is multiplied at once"),
    "projected": (hsm.LSTM(8, 8, proj_size=3, bidirectional=True), torch.zeros(5, 3, 8), "packed"),
}


@pytest.mark.parametrize("what", CALLS)
def test_the_way_of_a_call(what: str) -> None:
    module, input, words = CALLS[what]
    with torch.no_grad():
        plan = hsm.explain(module, input)
    assert plan.backend == "cpu"
    assert plan.variant in ("portable", "avx2", "avx512")  # float32
    assert any(word in plan.reason for word in words.split("|"))


def test_training_packs_in_any_case() -> None:
    rnn, x = hsm.LSTM(512, 512), torch.zeros(2, 9, 512)
    assert "W_hh packed once for all steps" in hsm.explain(rnn, x).reason
    assert "read as they lie" in hsm.explain(rnn.requires_grad_(False), x).reason


def test_packed_sequence() -> None:
    packed = nn.utils.rnn.pack_sequence([torch.zeros(7, 4), torch.zeros(5, 4)])
    assert "of 7 steps" in hsm.explain(hsm.GRU(4, 4), packed).reason


def test_one_thread() -> None:
    torch.set_num_threads(1)
    assert "; 1 thread; " in hsm.explain(hsm.GRU(64, 64), torch.zeros(99, 8, 64)).reason


def test_a_chosen_instruction_set() -> None:
    code = "import torch, hsm_kernels as hsm; print(hsm.explain(hsm.GRU(4, 4), torch.zeros(5, 3, 4)).variant)"
    environment = {**os.environ, "HSM_KERNELS_CPU_ISA": "portable"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "portable"
