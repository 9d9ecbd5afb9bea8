"""JAX: step, inference and training by ``jax.lax.scan``, compiled, in float32.

XLA has no setting for its number of threads on a CPU. It makes a pool with one thread for each CPU
that the thread which creates the backend may run on. So the backend is created, once per thread
count, and called while this thread is bound to as many CPUs as the row has threads; the pool
inherits them.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from cases import Problem
from peers import Peer, Prepared
from torch import Tensor

_backend_threads = 0


@contextmanager
def bound(problem: Problem) -> Iterator[None]:
    """Let this thread, and those that it creates, run on as many CPUs as the row has threads."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[: problem.case.threads])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def prepare(problem: Problem) -> Prepared | None:
    """A compiled call."""
    case = problem.case
    if case.dtype != "float32":
        return None
    with bound(problem):
        use_threads(case.threads)
        arguments = [to_jax(tensor) for tensor in problem.torch_nn.all_weights[0]]
        sequence = to_jax(problem.input)
        if case.kind == "training":
            function, more = training(case.op), [to_jax(problem.output_gradient)]
        else:
            function, more = forward(case.op), []
            if case.kind == "step":
                given = problem.state if isinstance(problem.state, tuple) else (problem.state,)
                more = [tuple(to_jax(part[0]) for part in given)]
            # Faster here; in training the layout of torch.nn is.
            arguments[:2] = [to_jax(w.t()) for w in problem.torch_nn.all_weights[0][:2]]
        return compiled_call(function, [sequence, arguments, *more], problem)


def compiled_call(
    function: Callable[..., Any], arguments: list[Any], problem: Problem
) -> Prepared:
    """Compile ``function`` for its arguments."""
    import jax

    call = jax.jit(function).lower(*arguments).compile()

    def read(results: Any) -> tuple[Tensor, ...]:
        output, *more = (torch.tensor(x.__array__()) for x in jax.tree.leaves(results))
        if problem.case.kind == "step":
            return output, *(part[None] for part in more)
        return output, *(more if problem.case.kind == "training" else [])

    return Prepared(lambda: jax.block_until_ready(call(*arguments)), read)


def use_threads(threads: int) -> None:
    """Make a backend with so many threads; what was compiled for the one before is lost."""
    global _backend_threads
    if threads == _backend_threads:
        return
    import jax
    from jax.extend.backend import clear_backends

    jax.config.update("jax_platforms", "cpu")
    clear_backends()
    jax.devices()
    _backend_threads = threads


def to_jax(tensor: Tensor) -> Any:
    """A copy as JAX's array."""
    import jax.numpy as jnp

    return jnp.array(tensor.detach().contiguous().numpy())


def forward(op: str) -> Callable[..., Any]:
    """(sequence, weights, state) -> (output, *state); weights ``(I, G * H)``, ``(H, G * H)``."""
    import jax
    import jax.numpy as jnp

    def lstm(sequence: Any, w_ih: Any, w_hh: Any, b_ih: Any, b_hh: Any, state: Any) -> Any:
        def step(state: Any, gates: Any) -> Any:
            h, c = state
            i, f, g, o = jnp.split(gates + h @ w_hh, 4, -1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        return jax.lax.scan(step, state, sequence @ w_ih + (b_ih + b_hh))

    def gru(sequence: Any, w_ih: Any, w_hh: Any, b_ih: Any, b_hh: Any, state: Any) -> Any:
        def step(state: Any, gates: Any) -> Any:
            (h,) = state
            r, z, n = jnp.split(gates, 3, -1)
            r_h, z_h, n_h = jnp.split(h @ w_hh + b_hh, 3, -1)
            z = jax.nn.sigmoid(z + z_h)
            h = (1 - z) * jnp.tanh(n + jax.nn.sigmoid(r + r_h) * n_h) + z * h
            return (h,), h

        return jax.lax.scan(step, state, sequence @ w_ih + b_ih)

    cell, parts = {"LSTM": (lstm, 2), "GRU": (gru, 1)}[op]

    def call(sequence: Any, weights: Any, state: Any = None) -> Any:
        zeros = jnp.zeros((sequence.shape[1], weights[1].shape[0]), sequence.dtype)
        begin = (zeros,) * parts if state is None else state
        end, output = cell(sequence, *weights, begin)
        return output, *end

    return call


def training(op: str) -> Callable[..., Any]:
    """(sequence, torch.nn's weights, gradient) -> (output, gradients of sequence and weights)."""
    import jax

    compute = forward(op)

    def output(sequence: Any, weights: Any) -> Any:
        w_ih, w_hh, *biases = weights
        return compute(sequence, [w_ih.T, w_hh.T, *biases])[0]

    def call(sequence: Any, weights: Any, output_gradient: Any) -> Any:
        found, gradients = jax.vjp(output, sequence, weights)
        return found, *gradients(output_gradient)

    return call


JAX = Peer(
    "JAX",
    prepare,
    bound,
    packages=("jax",),
    settings="float32; jax.lax.scan, input product outside, compiled ahead; weights laid out as is "
    "faster; backend created and called bound to as many CPUs as the row has threads",
)
