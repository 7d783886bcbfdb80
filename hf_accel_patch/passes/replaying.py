"""One call of `generate` whose passes are recorded and replayed, and what a model keeps of them for the next."""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.utils import ModelOutput

from hf_accel_patch.compat import CACHE, given_cache
from hf_accel_patch.families import dtype_of
from hf_accel_patch.logs import get_logger
from hf_accel_patch.ops.agreeing import agree
from hf_accel_patch.ops.graphs import Recorder, marked
from hf_accel_patch.ops.pacing import Pace
from hf_accel_patch.ops.refusing import Refused, overheard
from hf_accel_patch.passes.layers import Places, _InPlace
from hf_accel_patch.passes.recordable import masks, unfit
from hf_accel_patch.passes.rooms import SPARE, Of, Pass, Room, Step, reserve, token_bytes, visible

logger = get_logger(__name__)
WIDTHS = (1, 2, 4, 8, 16)  # tokens of a recorded pass
MOVES = 3  # of a cache out of its room in one call of `generate`; after more of them another room would not pay
AHEAD = 64  # tokens to come, of which a recorded step sees the place at least, so that texts end in one
NEAR = 8  # the same where fewer are to come
WIDER = 4  # times as many passes as make a recording pay may go through a wider one if they do not fill their own
UNKNOWN = 1024  # the same where nothing says how many are to come
KNOWN = {"input_ids", "attention_mask", "position_ids", CACHE, "use_cache", "logits_to_keep", "return_dict"}


class Graphs:
    """What was recorded of one model. One object serves all threads; a copy of the model gets its own."""

    def __init__(self, never: str = "", asked: bool = False) -> None:
        self.never = self.off = never  # why nothing is recorded
        self.asked = asked  # whether somebody wants it
        self.recorder: Recorder | None = None
        self.rooms: list[Room] = []
        self.lock = threading.RLock()
        self.counts: Counter[str] = Counter()
        self.waited: Counter[tuple[int, int, Of]] = Counter()  # passes that might have been replayed
        self.eager: Counter[str] = Counter()  # calls that went the ordinary way, by the reason
        self.pending: dict[int, Decoding] = {}  # by thread
        self.made_of: object = None  # see `identity` in passes/graphs.py
        self.hooked = ""  # why a model that is made of this replays nothing

    def __reduce__(self) -> Any:
        return Graphs, (self.never, self.asked)

    def __deepcopy__(self, memo: dict[int, Any]) -> Graphs:
        return Graphs(self.never, self.asked)

    def room_for(self, layers: list[_InPlace], need: int) -> Room | None:
        """The room that these layers are in or could move into, with `need` entries."""
        with self.lock:
            mine = next((room for room in self.rooms if room.knows(layers[0])), None)
            if mine is not None and mine.holds(layers) and mine.capacity >= need:
                return mine
            if mine is not None:  # it is too small, or something else has moved the layers
                self.rooms.remove(mine)
            return next((room for room in self.rooms if self._vacant(room, layers, need)), None)

    def enter(self, room: Room | None, layers: list[_InPlace], need: int, most: int) -> Room:
        """Let layers move into this room, or a new one for `most` entries. Others that nobody uses are given up."""
        with self.lock:
            if room is not None and room.holds(layers):
                return room
            if room is not None and (not self._vacant(room, layers, need)):  # another thread was faster
                room = None
            self.rooms = [each for each in self.rooms if each is room or not each.left()]
            if room is None:
                room = Room(layers, -(-max(most, need) // 256) * 256)
                self.rooms.append(room)
            room.take(layers)
            return room

    def _vacant(self, room: Room, layers: list[_InPlace], need: int) -> bool:
        return room in self.rooms and room.capacity >= need and room.free() and room.suits(layers)

    def stop(self, reason: str, *, refused: bool = False) -> None:
        """Nothing is recorded or replayed any more. `refused`: because this model cannot be."""
        with self.lock:
            if not self.off:
                say = logger.info if refused and not self.asked else logger.warning
                say(f"steps are not recorded and replayed any more, and run as before: {reason}")
            self.off, self.rooms, self.recorder = reason, [], None

    def facts(self) -> dict[str, Any]:
        """For the report."""
        facts: dict[str, Any] = {"graphs": f"off: {self.off}" if self.off else "on"}
        return (
            facts
            | {f"graphs_{name}": count for name, count in self.counts.items()}
            | ({"graphs_not_used": dict(self.eager)} if self.eager else {})
        )


@dataclass
class Decoding:
    """Calls the model in one call of `generate`."""

    graphs: Graphs
    model: PreTrainedModel
    recorder: Recorder
    limit: int  # tokens at the end; 0: unknown
    pace: Pace | None = None  # is told of a pass that takes longer than such passes will
    room: Room | None = None  # in which the last pass was
    moves: int = 0  # how often somebody else has taken the cache out of its room
    refused: set[str] = field(default_factory=set)
    other: str = ""  # what else the model returns
    of: Of = None  # the model, where it is not the one whose cache this is

    def beside(self, model: PreTrainedModel) -> Decoding:
        """The same for another model that works on this cache."""
        return Decoding(self.graphs, model, self.recorder, self.limit, self.pace, of=weakref.ref(model))

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        """As the model is called: all sequences go on at the same place."""
        plain = partial(self.model, *args, **inputs)
        ids, cache = inputs.get("input_ids"), given_cache(inputs)
        if self.graphs.off or args or ids is None or ids.ndim != 2 or ids.shape[1] > WIDTHS[-1]:
            return plain()
        (B, t), mask, positions = ids.shape, inputs.get("attention_mask"), inputs.get("position_ids")
        length = 0 if cache is None else cache.get_seq_length()
        if not length:
            return plain()
        if type(cache) is not DynamicCache:
            return self._refuse(f"the cache is a {type(cache).__name__}", plain)
        keep = inputs.get("logits_to_keep")
        other = {name for name, each in inputs.items() if each is not None and each is not False} - KNOWN
        if other:
            return self._refuse(f"the model is given {', '.join(sorted(other))}", plain)
        if mask is not None and (not isinstance(mask, Tensor) or mask.shape != (B, length + t)):
            return self._refuse("the mask is not one of padding", plain)
        if positions is not None and (positions.ndim != 2 or positions.shape[1] != t):
            return self._refuse("positions have more than two dimensions", plain)
        if not (keep is None or isinstance(keep, int)) or not inputs.get("use_cache", True):
            return self._refuse("logits of some tokens are asked for, or no cache", plain)
        return self.run(Pass(cache, ids, length, positions, length + t, mask, plain, keep=keep or 0))

    def run(self, given: Pass) -> Any:
        """One pass: replayed, recorded, or the ordinary one."""
        layers, t, room = given.cache.layers, given.tokens.shape[1], self.room
        if self.graphs.off or t > WIDTHS[-1]:
            return given.plain()
        if reason := self._unfit():
            return self._refuse(reason, given.plain)
        if room is None or room.capacity < given.stop + SPARE or not room.holds(layers):
            if reason := unfit(given.cache, self.model):
                return self._refuse(reason, given.plain)
            self.moves += room is not None and room.capacity >= given.stop + SPARE
            if self.moves > MOVES:
                self.room = None
                return self._refuse("others move the cache between passes", given.plain)
            room = self.graphs.room_for(layers, given.stop + SPARE)
        width, to_come = next(each for each in WIDTHS if each >= t), self._to_come(given.stop)
        step = None if room is None else room.step(width, given.stop, self.of)
        alike = len(given.tokens), width, self.of
        patient = self.graphs.waited[alike] < WIDER * self.recorder.passes and width != t
        if step is None and room is not None and patient:
            steps = ((each, room.step(each, given.stop, self.of)) for each in WIDTHS if each > width)
            width, step = next((pair for pair in steps if pair[1] is not None), (width, None))
            self.graphs.waited[alike] += step is not None
        if step is None and to_come + self.graphs.waited[alike] < self.recorder.passes * max(1, width // 2):
            self.graphs.waited[alike] += 1
            return given.plain()
        if room is None or room is not self.room:
            most = given.stop + min(to_come, reserve(layers)) + SPARE
            if room is None and (limit := self.recorder.most_bytes) and token_bytes(layers) * most > limit:
                return self._refuse(f"the cache would be moved to more than {limit >> 20} MiB for it", given.plain)
            try:
                self.room = room = self.graphs.enter(room, layers, given.stop + SPARE, most)
            except torch.OutOfMemoryError:
                return self._refuse("there is no memory for buffers that stay where they are", given.plain)
            step = room.step(width, given.stop, self.of)
        if step is None:
            return self._record(room, width, given)
        return self._replay(room, step, width, given)

    def _replay(self, room: Room, step: Step, width: int, given: Pass) -> Any:
        t = given.tokens.shape[1]
        try:
            room.fill(width, given)
            logits = step.recorded.replay()[:, t - min(given.keep or t, t) : t]
        except Exception as error:
            self.graphs.stop(f"a replay failed: {_line(error)}")
            return given.plain()
        self.graphs.counts["replayed"] += 1
        if not step.tried:
            step.tried = True
            self._say_held_up()
            outputs = given.plain()  # writes the same entries again
            if not agree(logits, outputs.logits[:, -logits.shape[1] :], dtype_of(self.model)):
                self.graphs.stop("a replay gave other logits than the model")
            return outputs
        for layer in given.cache.layers:
            layer.settle(given.stop)
        return step.kind(logits=logits, **{CACHE: given.cache})

    def _record(self, room: Room, width: int, given: Pass) -> Any:
        """The ordinary pass, and then the same recorded."""
        self._say_held_up()
        outputs = given.plain()
        returned = set(outputs) if isinstance(outputs, ModelOutput) else {"a tuple"}
        if returned != {"logits", CACHE}:
            self.other = ", ".join(sorted(returned - {"logits", CACHE}))
            return outputs
        size = min(room.capacity, visible(given.stop + max(NEAR, min(self._to_come(given.stop), AHEAD))))
        places = (placed for layer in given.cache.layers for placed in layer.placed())
        entries = [each.view()[..., -given.tokens.shape[1] :, :] for each in places]
        kept = [each.clone() for each in entries]
        try:
            room.fill(width, given)
            with self.graphs.lock, marked():
                recorded = self.recorder(partial(self._forward, room, width, size, given.cache))
        except Exception as error:
            self.graphs.stop(_line(error), refused=isinstance(error, Refused))
            return outputs
        finally:  # whatever was recorded has written these too, and is compared with the model only when it is replayed
            for each, entry in zip(entries, kept, strict=True):
                each.copy_(entry)
        room.add(width, size, Step(recorded, type(outputs)), self.of)
        self.graphs.counts["recorded"] += 1
        if recorded.fused:
            self.graphs.counts["fused"] = recorded.fused
        self.graphs.waited[len(given.tokens), width, self.of] = 0
        return outputs

    def _forward(self, room: Room, width: int, size: int, cache: Any) -> Tensor:
        """What is recorded: the model over tokens that see the first `size` entries, as far as they lie before them."""
        given, model = room.inputs(width), self.model
        mask = masks(model, room, given.places, size, cache)
        inputs = {"input_ids": given.tokens, "attention_mask": mask, "position_ids": given.positions}
        before = [layer.apart for layer in cache.layers]
        try:
            for layer in cache.layers:
                layer.apart = Places(given.places, size, room.rows)
            logits: Tensor = model(**inputs, **{CACHE: cache}, use_cache=True, return_dict=True).logits
        finally:
            for layer, apart in zip(cache.layers, before, strict=True):
                layer.apart = apart
        return logits

    def _say_held_up(self) -> None:
        if self.pace is not None:
            self.pace.held_up = True

    def _to_come(self, stop: int) -> int:
        return max(0, self.limit - stop) if self.limit else UNKNOWN

    def _refuse(self, reason: str, plain: Any) -> Any:
        """The ordinary way, and say why, once in a call of `generate`."""
        if reason not in self.refused:
            self.refused.add(reason)
            self.graphs.eager[reason] += 1
        return plain()

    def _unfit(self) -> str:
        """Why no pass is recorded now."""
        if torch.is_grad_enabled() or torch.is_autocast_enabled(self.recorder.device.type):
            return "gradients or autocast are on"
        if reason := overheard():
            return reason
        return f"the model returns {self.other}" if self.other else ""


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
