"""GQA: fewer key/value heads, so that the cache is smaller by as much."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from transformers import PreTrainedConfig

from hf_accel_patch.errors import UnsupportedModel
from hf_accel_patch.families import View, first_cached_module
from hf_accel_patch.families.fewer_heads import Stock, compared, grouped_config
from hf_accel_patch.families.handwritten import without_shared
from hf_accel_patch.families.heads import Layout, layouts, query_heads, shared_heads
from hf_accel_patch.families.latent import latent_sizes
from hf_accel_patch.families.offloading import refuse_offloaded
from hf_accel_patch.journal import Journal
from hf_accel_patch.ops.modules import QuantizedModule
from hf_accel_patch.passes.calibrate import token_ids
from hf_accel_patch.passes.converting import Conversion, converted
from hf_accel_patch.passes.grouped import group, is_grouped
from hf_accel_patch.passes.quantize import comparable
from hf_accel_patch.passes.rope import configure
from hf_accel_patch.passes.saving import make_savable
from hf_accel_patch.plan import Skip, Step

Merge = Literal["aligned", "mean", "first", "random"]
MERGES = get_args(Merge)


@dataclass(frozen=True)
class GQA:
    """Key/value heads in `kv_heads` groups, one shared head each (arXiv 2305.13245; 1 is multi-query attention). The
    cache, and what a decode reads of it, shrink by the same factor. Outputs change.

    `mean` of consecutive heads, the `first` of them, or `random` new ones are the published baselines, to be trained.
    `aligned` loses a small part of what these do, without training: heads that are alike share a group, and keys and
    values are merged after alignment by whatever the queries and the output projection can take back: values, and keys
    without RoPE, by any matrix; keys under RoPE within each rotated pair of channels (arXiv 2412.20677); keys under a
    norm not at all. What counts as alike is measured on the inputs that each layer sees, on random tokens, or better on
    the texts of `calibrate`. Query heads move with their keys, but for models where a head's place means something
    (ALiBi): there groups are consecutive.

    What comes out is an ordinary model: `save_pretrained` writes a checkpoint that transformers loads by itself, where
    the class knows key/value heads. Where it does not (GPT-2, GPT-NeoX, BLOOM, MPT, OPT, ...), our attention runs it,
    and the checkpoint loads with this package. It trains as any model does.

    With `calibrate` each output projection is also fitted by least squares to what its layer gave before, which takes a
    second reading of the texts. Together that about halves what is lost.

    With `originals="discard"` each layer's weights are freed before the next layer is converted. Beside the model, one
    attention layer in float64 is held at a time.

    >>> model = patch(model, gqa=GQA(2, calibrate=texts))
    """

    kv_heads: int  # key/value heads afterwards; divides those of the model
    merge: Merge = "aligned"  # how the heads of a group become one
    calibrate: Sequence[Any] | None = field(default=None, repr=False)  # texts, or tensors of token ids [T] or [B, T]
    originals: Literal["keep", "discard"] = "keep"  # whether the weights stay in memory, for `unpatch`
    tokenizer: Any = field(default=None, repr=False)  # for `calibrate`; None: that at model.name_or_path

    name = "gqa"

    def __post_init__(self) -> None:
        if isinstance(self.kv_heads, bool) or not isinstance(self.kv_heads, int):
            raise TypeError(f"gqa: kv_heads={self.kv_heads!r} is not a number of key/value heads")
        if self.merge not in MERGES:
            raise ValueError(f"gqa: unknown merge {self.merge!r}; allowed: {', '.join(MERGES)}")
        if self.originals not in ("keep", "discard"):
            raise ValueError(f"gqa: originals={self.originals!r}; allowed: 'keep', 'discard'")
        if self.calibrate is not None:
            if self.merge != "aligned":
                raise ValueError(f"gqa: calibrate= applies to merge='aligned'; {self.merge!r} looks at no text")
            object.__setattr__(self, "calibrate", comparable(self.calibrate))

    def inspect(self, view: View) -> Step | Skip:
        now, heads = shared_heads(view.config), query_heads(view.config)
        self._refuse(view, heads)
        allowed = [n for n in range(1, now + 1) if now % n == 0 and heads % n == 0]
        if self.kv_heads not in allowed:
            raise ValueError(
                f"gqa={self.kv_heads}: {view.subject} has {now} key/value heads; allowed are its divisors: "
                f"{', '.join(map(str, allowed))}"
            )
        size = view.weight_bytes()
        if self.kv_heads == now:
            return Skip(self, f"it has {now} key/value head{'s' if now > 1 else ''} already", size)
        config = grouped_config(view.config, self.kv_heads)
        stock, own = self._how(view, now, config)
        found = stock.layouts or own
        config = grouped_config(view.config, self.kv_heads, own=True) if own else config
        saved = sum(each.saved_bytes(self.kv_heads) for each in found)
        cached = (("before", now), ("after", self.kv_heads))
        facts: dict[str, Any] = {"exact": False, "bytes_before": size, "bytes_after": size - saved}
        facts |= {"kv_heads": self.kv_heads, "was": now, "merge": self.merge, "layers": len(found)}
        facts |= {f"cache_bytes_per_token_{when}": sum(each.token_bytes(n) for each in found) for when, n in cached}
        facts |= {"calibrated": "on texts"} if self.calibrate is not None else {}
        facts |= {"attention": "ours: its class has no key/value heads"} if own else {}
        windows = token_ids(self.calibrate, view.model, self.tokenizer) if self.calibrate is not None else []
        conversion = Conversion(view, found, self.kv_heads, self.merge, windows, config, stock.attributes, bool(own))
        return Step(self, facts | {"originals": self.originals}, (conversion,), reshapes=True)

    def apply(self, step: Step, journal: Journal) -> None:
        """Layer by layer, then the configuration."""
        conversion: Conversion = step.work[0]
        keep = self.originals == "keep"
        for layout in converted(conversion, journal, keep):
            if conversion.own:
                group(layout.module, self.kv_heads, journal)
        configure(conversion.view, conversion.config, journal)
        if conversion.own:
            make_savable(conversion.view.model, journal)

    def _refuse(self, view: View, heads: int) -> None:
        """Raise UnsupportedModel for what has no key/value heads to merge, or cannot have them merged."""
        asked = f"gqa={self.kv_heads}: {view.subject}"
        quantizer = getattr(view.model, "hf_quantizer", None)
        if quantizer is not None or any(isinstance(module, QuantizedModule) for _, module in view.named_modules()):
            raise UnsupportedModel(
                f"{asked} has quantized weights",
                "convert the float model first; patch(model, gqa=N, quantize=...) does",
            )
        if view.config.is_encoder_decoder:
            raise UnsupportedModel(f"{asked} is an encoder-decoder", "leave gqa out")
        if any(latent_sizes(module) for _, module in view.named_modules()):
            raise UnsupportedModel(
                f"{asked} caches one latent for all heads (MLA), which is smaller than any head", "leave gqa out"
            )
        if not heads or first_cached_module(view) is None:
            raise UnsupportedModel(f"{asked} has no attention with heads", "leave gqa out")
        refuse_offloaded(view, f"gqa={self.kv_heads}")

    def _how(self, view: View, now: int, config: PreTrainedConfig) -> tuple[Stock, list[Layout]]:
        """As the class itself is with fewer heads, or else by our own attention. Raises UnsupportedModel."""
        asked = f"gqa={self.kv_heads}: {view.subject}"
        found = layouts(view, now)
        if any(is_grouped(each.module) for each in found):
            return Stock([], []), found
        keys = [id(parameter) for each in found for parameter in each.key.parameters()]
        if len(set(keys)) < len(keys):
            raise UnsupportedModel(f"{asked}: its layers share their attention weights", "leave gqa out")
        if not found:
            raise UnsupportedModel(f"{asked}: how its heads lie in its projections is not known", "leave gqa out")
        try:
            stock = compared(view, found, config, self.kv_heads)
        except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, NotImplementedError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UnsupportedModel(
                f"{asked}: its class cannot be built with them: {reason}", "leave gqa out"
            ) from error
        if stock.problem:
            raise UnsupportedModel(f"{asked}: {stock.problem}", "leave gqa out")
        if stock.layouts:
            return stock, []
        own = [each for each in found if without_shared(type(each.module)) is not None]
        if not own or len(own) != len(found) or len({each.index for each in own}) < len(own):  # one looks elsewhere
            raise UnsupportedModel(
                f"{asked}: its class knows no key/value heads, and there is no attention of ours in its place",
                "leave gqa out",
            )
        return Stock([], []), own
