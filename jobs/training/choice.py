"""Which signal a training asks for: what the config names, or for `auto` the cheapest that is exact enough.

Pure arithmetic on sizes. Whoever computes the teacher's head, its products are the same; so the choice is one of bytes
on the wire against exactness, and of where the products are formed.
"""

from jobs.config import DistillConfig
from services.teacher.schema import TeacherDescription
from services.teacher.signals import SignalKind, SignalSpec

HIDDEN_BYTES = 4096
"""Up to here `auto` takes exact hidden states rather than an approximation: 50,000 tokens/s are then 200 MB/s."""


def choose_signal(config: DistillConfig, teacher: TeacherDescription) -> tuple[SignalSpec, str]:
    """The signal to ask for, and the reason as a line for people."""
    columns = teacher.vocab_size
    kinds: tuple[SignalKind, ...] = ("hidden", "topk", "sampled", "dense")
    specs = {
        kind: SignalSpec(
            kind,
            columns,
            config.top_k,
            (config.temperature,),
            config.logprob_bits,
            config.draws,
            config.proposal,
        )
        for kind in kinds
    }
    sizes = {kind: spec.bytes_per_position(teacher.hidden_size) for kind, spec in specs.items()}
    kind: SignalKind
    if config.signal != "auto":
        kind, why = config.signal, "as configured"
    elif sizes["dense"] <= min(sizes["hidden"], sizes["topk"]):
        kind, why = "dense", "all columns are fewer bytes than anything else"
    elif sizes["hidden"] <= HIDDEN_BYTES:
        kind, why = "hidden", f"exact, and at most {HIDDEN_BYTES:,} bytes"
    elif config.divergence != "forward_kl":
        kind, why = "hidden", f"{config.divergence} is exact from nothing smaller"
    else:
        kind, why = "topk", f"hidden states would be {sizes['hidden']:,} bytes"
    exactness = {
        "hidden": f"{config.divergence} exact; {_flops(2 * teacher.hidden_size * columns)} per position for its head",
        "dense": f"{config.divergence} exact",
        "topk": _topk_meaning(config, specs["topk"]),
        "sampled": f"forward_kl without bias from {config.draws} draws; the head's products stay with the teacher",
    }[kind]
    others = ", ".join(f"{other} {sizes[other]:,}" for other in kinds if other != kind)
    return specs[kind], f"signal {kind} ({why}): {sizes[kind]:,} bytes per position ({others}); {exactness}"


def _topk_meaning(config: DistillConfig, spec: SignalSpec) -> str:
    if spec.kept == spec.vocab_size:
        return f"{config.divergence} exact"
    buckets = f"{config.divergence} between the {spec.kept} likeliest tokens and one bucket for the rest"
    if config.divergence == "forward_kl":
        return f"{buckets}: differs from the full one only inside that bucket"
    return f"{buckets}: at most the full one, and how the student fills the bucket is left to it"


def _flops(flops: float) -> str:
    return f"{flops / 1e6:,.1f} MFLOP"
