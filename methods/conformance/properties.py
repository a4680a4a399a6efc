"""What every run-time method must do: one function for each property.

Each takes a `Case` and raises a `Violation` that says what was found. They look at a cache from
outside, as a decoder does; what they run is the decoder itself, at sizes where a step takes a
millisecond.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from kvlab.methods.axis import Choice, Method
from kvlab.methods.cache.opening import open_cache
from kvlab.methods.cache.storage import Space, Storage
from kvlab.methods.conformance.cases import (
    VOCABULARY,
    WIDE,
    Case,
    UnfitError,
    covering,
    decoder,
    kept_rows,
    padded,
    refuse,
    texts,
)
from kvlab.methods.conformance.device import NOWHERE, Away, Device, send
from kvlab.methods.conformance.graph import RefusedError, capture
from kvlab.methods.conformance.run import Run
from kvlab.methods.conformance.storages import bytes_of
from kvlab.methods.cost import cost_of
from kvlab.methods.decoder.config import DecoderConfig
from kvlab.methods.decoder.graph import LEAST, Graph, Greedy
from kvlab.methods.decoder.language_model import TokenSession
from kvlab.methods.registry import resolve
from kvlab.methods.weights import read_tensors, write_tensors

CLOSE = 1e-5
"""How far logits may be apart, as a share of the largest of them."""
BYTES = 0.02
"""How far bytes may be from those predicted, as a share of these."""
STEPS = 5
"""Decode steps that are counted, after four others."""


class Violation(AssertionError):
    """A method that lacks a property."""


def parity(case: Case) -> None:
    """With room for all rows the logits are those of the full cache.

    At the same precision too, unless that turns on which rows share a slot or a rotation; what a
    precision changes by itself is held to the error that its storage states.
    """
    rows = _covered(case)
    ids, prompt = texts(2, rows), max(1, rows - 6)
    wide = covering(case.method, rows)
    pairs = [(_with(wide, None), resolve({}))]
    choice = case.method.choices.get("precision")
    if choice is not None:
        opened = open_cache(
            case.config, wide, batch=2, tokens=rows, device=torch.device("cpu"), dtype=torch.float32
        )
        by_row = choice.value.load().by_row or case.config.windows is None
        if by_row and not opened.rotates:
            pairs.append((wide, _with(resolve({}), choice)))
    for chosen, full in pairs:
        found, expected = (_text(case, method, ids, prompt) for method in (chosen, full))
        _close(found, expected, f"a text of {rows} tokens, {prompt} of them a prompt")
    _stated_error(case.method)


def causality(case: Case) -> None:
    """Tokens that come later change no logits before them: in a prompt, and in a turn."""
    prompt, turn, same = case.length(), 7, 3
    ids = texts(2, prompt + 4 + turn)
    for place, what in ((prompt - turn + same, "prompt"), (prompt + 4 + same, "turn")):
        other = ids.clone()
        other[:, place:] = (other[:, place:] + 1) % VOCABULARY
        found = []
        for text in (ids, other):
            run = Run(case.model(), case.method, 2, prompt + 4 + turn)
            first = run.read(text[:, :prompt])
            steps = run.steps(text[:, prompt : prompt + 4])
            last = run.read(text[:, prompt + 4 :])
            found.append(torch.cat((first, steps, last), 1)[:, :place])
        _close(found[0], found[1], f"rows before one that changes, in a {what}")


def multi_turn(case: Case) -> None:
    """A turn finds the same past in a cache that was saved and restored before it."""
    prompt, turn = case.length(), 5
    total = prompt + 4 + turn + 4
    ids, valid = texts(2, total), padded([prompt, prompt - 3])
    run = Run(case.model(), case.method, 2, total)
    run.read(ids[:, :prompt], valid)
    run.steps(ids[:, prompt : prompt + 4])
    other = _restored(case, run, total)
    for each in ("read", "steps"):
        start = prompt + 4 if each == "read" else prompt + 4 + turn
        stop = start + turn if each == "read" else total
        found, expected = (getattr(r, each)(ids[:, start:stop]) for r in (other, run))
        _close(found, expected, f"{'a second turn' if each == 'read' else 'its answer'}")


def batch(case: Case) -> None:
    """A batch of unequal lengths is the same as its sequences one by one."""
    prompt = case.length()
    lengths = [prompt, prompt - 5, prompt // 2 + 1, prompt - 1]
    total = prompt + 5 + 6 + 3
    ids = texts(4, total)
    exact = case.model(torch.float64)  # rounding must not decide which row stays
    together = _conversation(Run(exact, case.method, 4, total), ids, prompt, lengths)
    for i, length in enumerate(lengths):
        one = ids[i : i + 1, prompt - length :]
        alone = Run(exact, case.method, 1, total - prompt + length)
        expected = _conversation(alone, one, length, None)
        for what, found in together.items():
            _close(
                found[i : i + 1, -expected[what].shape[1] :], expected[what],
                f"sequence {i} of {length} prompt tokens in a batch of 4, {what}",
            )  # fmt: skip


def save_and_load(case: Case) -> None:
    """A cache written to a file in mid-generation and read again goes on to the last bit."""
    prompt = case.length()
    total = prompt + 12
    ids, valid = texts(3, total), padded([prompt, prompt - 2, prompt // 2 + 1])
    run = Run(case.model(), case.method, 3, total)
    run.read(ids[:, :prompt], valid)
    run.steps(ids[:, prompt : prompt + 5])
    other = _restored(case, run, total)
    found, expected = (r.steps(ids[:, prompt + 5 :]) for r in (other, run))
    if not torch.equal(found, expected):
        raise Violation(
            f"after saving and loading, logits are off by up to {_apart(found, expected):.1e}"
        )
    if other.cache.nbytes() != run.cache.nbytes():
        raise Violation(
            f"the loaded cache holds {other.cache.nbytes()} bytes, the saved one "
            f"{run.cache.nbytes()}"
        )


def bytes_held(case: Case) -> None:
    """A live cache holds the bytes that its cost predicts, and says how many it holds."""
    config = DecoderConfig(VOCABULARY, **WIDE)
    refuse(case.method, config)
    prompt, new = 488, 24  # so long that whole groups of rows (KIVI) count for little
    run = Run(decoder(config), case.method, 2, prompt + new)
    text = texts(1, prompt + new).expand(2, -1)
    run.read(text[:, :prompt])
    run.steps(text[:, prompt:])
    predicted = 2 * cost_of(config, case.method).kv_bytes(prompt + new, 4, prompt)
    said, held = run.cache.nbytes(), bytes_of(run.cache)
    if abs(said - predicted) > BYTES * predicted:
        raise Violation(
            f"holds {said} bytes after {prompt} + {new} tokens of 2 sequences, its cost predicts "
            f"{predicted}"
        )
    if held - said > BYTES * predicted:
        raise Violation(f"says it holds {said} bytes, holds {held}")


def operations(case: Case) -> None:
    """A decode step takes as many operations for 64 sequences as for 4."""
    few, many = (_counted(case, copies) for copies in (1, 16))
    if few != many:
        more = ", ".join(f"{n:+d} {name}" for name, n in _difference(few, many).items())
        raise Violation(
            f"{STEPS} decode steps take {few.total()} operations for 4 sequences, {many.total()} "
            f"for 64: {more}"
        )


def no_waiting(case: Case) -> None:
    """A decode step never waits for the device, but where a budget is divided anew."""
    with torch.no_grad(), Device() as device:
        run = Run(send(case.model()), case.method, 4, case.length() + 4 + STEPS, device=NOWHERE)
        ids = _warm(case, run, 1, lambda tensor: Away(tensor))
        waits = []
        for column in ids.unbind(1):
            device.waits.clear()
            run.step(column)
            waits.append(sorted(set(device.waits)))
    waited = [step for step, found in enumerate(waits, 1) if found]
    if len(waited) > _allowed(case.method):
        found = "; ".join(sorted({wait for step in waits for wait in step}))
        raise Violation(f"decode steps {waited} of {STEPS} wait for the device: {found}")


def replays(case: Case) -> None:
    """A decode step that a CUDA graph holds, replayed, is an eager one; see `Cache.freeze`."""
    model, prompt, new = case.model(torch.float64), case.length(), 3 * LEAST
    ids, valid = texts(2, prompt), padded([prompt, prompt - 3])
    refused: list[str] = []

    def captured(action: Callable[[], object]) -> Graph:
        try:
            return capture(action)
        except RefusedError as error:
            refused.append(str(error))
            raise

    found = []
    for how in (captured, None):
        session = TokenSession(model, ids, valid, new, case.method)
        greedy, tokens = Greedy(session, how), 0
        while tokens < new:
            tokens += len(greedy.more(new - tokens))
            found.append(session.logits.clone())
    if refused:
        raise Violation(f"it can be frozen, and a step of it cannot be captured: {refused[0]}")
    replayed, eager = found[: len(found) // 2], found[len(found) // 2 :]
    for number, (ours, theirs) in enumerate(zip(replayed, eager, strict=True), 1):
        _close(ours, theirs, f"token {number} after a prompt, by replays of one step")


PROPERTIES: dict[str, Callable[[Case], None]] = {
    check.__name__: check
    for check in (
        parity, causality, multi_turn, batch, save_and_load, bytes_held, operations, no_waiting,
        replays,
    )
}  # fmt: skip
"""Every property by name."""


def _with(method: Method, precision: Choice | None) -> Method:
    """The method at another precision; None: the model's own."""
    choices = dict(method.choices)
    choices.pop("precision", None)
    if precision is not None:
        choices["precision"] = precision
    return Method(method.label, choices)


def _covered(case: Case) -> int:
    """Tokens of the longest text of which the method keeps every row, of 24 at most."""
    full = case.cost(resolve({}))
    for rows in range(24, 1, -1):
        cost = case.cost(covering(case.method, rows))
        prompt = max(1, rows - 6)
        if kept_rows(cost, rows, prompt) >= kept_rows(full, rows, prompt):
            return rows
    raise UnfitError(f"'{case.method.label}' keeps not even two tokens")


def _text(case: Case, method: Method, ids: Tensor, prompt: int) -> Tensor:
    run = Run(case.model(), method, len(ids), ids.shape[1])
    return torch.cat((run.read(ids[:, :prompt]), run.steps(ids[:, prompt:])), 1)


def _stated_error(method: Method) -> None:
    """Compare rows put into the method's storage with those got from it."""
    choice = method.choices.get("precision")
    if choice is None:
        return
    space = Space(3, 2, 96, 32, torch.device("cpu"), torch.float32)
    storage: Storage = choice.value.load()(choice.params, space)
    generator = torch.Generator().manual_seed(2)
    k, v = (torch.randn(3, 2, 97, 32, generator=generator) for _ in range(2))
    storage.fill(k[:, :, :96], v[:, :, :96], torch.full((3,), 96))
    slots = torch.tensor([[[5]]]).expand(3, 2, 1)
    storage.put(slots if storage.by_row else slots[:, :1], k[:, :, 96:], v[:, :, 96:])
    for name, given, got in zip("kv", (k, v), storage.get(96), strict=True):
        expected = given[:, :, :96].clone()
        expected[:, :, 5] = given[:, :, 96]
        off = float((got - expected).abs().max() / expected.abs().max())
        if off > storage.error:
            raise Violation(
                f"{name} is off by {off:.2g} of the largest number, the storage of "
                f"'{choice.value.name}' states {storage.error:.2g}"
            )


def _allowed(method: Method) -> int:
    """Decode steps that may wait: those in which a budget is divided anew."""
    choice = method.choices.get("budget")
    if choice is None or "budget" not in method["eviction"].value.consumes:
        return 0
    refresh: int | None = choice.value.load()(choice.params).refresh
    return -(-STEPS // refresh) if refresh else 0


def _conversation(
    run: Run, ids: Tensor, prompt: int, lengths: list[int] | None
) -> dict[str, Tensor]:
    """The logits of a prompt, of steps, of a turn and of its answer."""
    found = {
        "its last prompt token": run.read(
            ids[:, :prompt], None if lengths is None else padded(lengths)
        )[:, -1:],
        "decode steps": run.steps(ids[:, prompt : prompt + 5]),
        "a turn": run.read(ids[:, prompt + 5 : prompt + 11]),
    }
    return found | {"its answer": run.steps(ids[:, prompt + 11 :])}


def _restored(case: Case, run: Run, tokens: int) -> Run:
    """A new run that goes on where another is, by way of a file."""
    size = len(run.next)  # type: ignore[arg-type]
    weight = next(run.decoder.parameters())
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        cache = open_cache(
            run.decoder.config, case.method,
            batch=size, tokens=tokens, device=weight.device, dtype=weight.dtype,
        )  # fmt: skip
        path = Path(folder) / "cache.safetensors"
        write_tensors(run.cache.state(), path)
        cache.restore(read_tensors(path))
    other = Run(run.decoder, case.method, size, tokens, cache)
    other.next = run.next
    return other


def _counted(case: Case, copies: int) -> Counter[str]:
    run = Run(case.model(), case.method, 4 * copies, case.length() + 4 + STEPS)
    ids = _warm(case, run, copies, lambda tensor: tensor)
    with torch.no_grad(), Device() as device:
        run.steps(ids)
    counts: Counter[str] = device.counts
    return counts


def _warm(case: Case, run: Run, copies: int, send: Callable[[Tensor], Tensor]) -> Tensor:
    """Read 4 unequal prompts, so many times over, and four tokens; return those to go on with."""
    prompt = case.length()
    valid = padded([prompt, prompt - 2, prompt - 3, prompt // 2 + 1]).repeat(copies, 1)
    ids = texts(4, prompt + 4 + STEPS).repeat(copies, 1)
    run.read(send(ids[:, :prompt]), send(valid))
    run.steps(send(ids[:, prompt : prompt + 4]))
    return send(ids[:, prompt + 4 :])


def _difference(few: Counter[str], many: Counter[str]) -> dict[str, int]:
    found = {name: many[name] - few[name] for name in {*few, *many}}
    ordered = sorted(found.items(), key=lambda item: -abs(item[1]))
    return {name: n for name, n in ordered[:3] if n}


def _apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def _close(found: Tensor, expected: Tensor, where: str) -> None:
    if not bool(torch.isfinite(found).all()):
        raise Violation(f"{where}: logits are not finite")
    off = _apart(found, expected)
    if off > CLOSE:
        raise Violation(f"{where}: logits are off by {off:.1e} of the largest, {CLOSE:.0e} at most")
