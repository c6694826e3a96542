"""How many cards keep each other busy, what they carry to each other, how long and for how much: on paper, before a
cluster is paid for. Nothing is started, no weight is read.

FLOPs per token: `2 * P` for a teacher's forward pass, `6 * P` for a student's forward and backward pass, P being the
parameters that a token meets; attention over the sequence comes on top. A card gives a stated share of its bfloat16
peak. What raystill does decides the rest: a teacher replica is one card, a student worker holds a whole student in
float32 with its gradients and AdamW's moments, and gradients are added up after the backward pass, not during it.
"""

import math
from dataclasses import asdict
from typing import Any

from pydantic import Field

from cluster.config import Config
from cluster.pools import most
from jobs.config import RunConfig
from jobs.planning.cards import Card, find_card
from jobs.planning.sizes import ModelSize, model_sizes
from jobs.training.choice import choose_signal
from services.teacher.schema import TeacherDescription

STUDENT_BYTES = 20
"""Held for each parameter of a student: float32 weight, gradient, the gradient's copy that is added up over workers,
and two moments. bfloat16 products keep two more."""
ROOM = 0.9
"""Of a card's memory, for what stays there; activations and the loss need the rest."""


class PlanOptions(Config):
    """What a plan assumes and the config does not say."""

    teacher_card: str = "h100"
    student_card: str = "h100"
    students: int | None = Field(None, ge=1)
    """Cards that train the student; default `train.num_workers`."""
    tokens: float | None = Field(None, ge=1)
    """Tokens to train on; default what the config's steps read."""
    teacher_utilisation: float = Field(0.5, gt=0, le=1)
    """Share of the card's bfloat16 peak that a forward pass over whole batches gets."""
    student_utilisation: float = Field(0.4, gt=0, le=1)
    network_gbps: float = Field(100.0, gt=0)
    """Between nodes, each way, in gigabits per second."""
    prices: dict[str, float] = Field(default_factory=dict)
    """Dollars for a card and hour, by card, instead of the table's."""


def plan(config: RunConfig, options: PlanOptions) -> dict[str, Any]:
    """The plan of a config as JSON values; `teacher` and `signal` are None where no teacher is asked.

    Raises:
        UserError: a model whose size cannot be told, or an unknown card.
    """
    of_teacher, of_student = model_sizes(config)
    length = config.data.sequence_length
    step_tokens = config.train.global_batch * length
    tokens = options.tokens or float(config.train.steps * step_tokens)
    card = find_card(options.student_card, options.prices)
    cards = options.students or most(config.train.num_workers)
    signal = _signal(config, of_teacher) if config.distils and of_teacher is not None else None
    flops = _student_flops(config, of_student, of_teacher if signal and signal["kind"] == "hidden" else None)
    student = _side(of_student, card, cards, flops, options.student_utilisation, _student_bytes(config, of_student))
    found = _pace(student, tokens, step_tokens, options.network_gbps)
    if signal is not None and of_teacher is not None and config.teacher is not None:
        card = find_card(options.teacher_card, options.prices)
        flops = of_teacher.forward_flops(length, head=signal["kind"] != "hidden")
        rate = card.bf16_tflops * 1e12 * options.teacher_utilisation / flops
        needed = max(1, math.ceil(found["tokens_per_s"] / rate))
        width = 4 if config.teacher.dtype == "float32" else 2
        size_b = width * of_teacher.parameters
        found["teacher"] = _side(of_teacher, card, needed, flops, options.teacher_utilisation, size_b)
        found["teacher"]["busy"] = found["tokens_per_s"] / (needed * rate)
        per_s = found["tokens_per_s"] * signal["bytes_per_position"]
        found["signal"] = signal | {
            "bytes_per_s": per_s,
            "gbps_per_student_node": per_s * 8e-9 / student["nodes"],
            "gbps_per_teacher_node": per_s * 8e-9 / found["teacher"]["nodes"],
            "label_bytes": tokens * signal["bytes_per_position"],
        }
    else:
        found |= {"teacher": None, "signal": None}
    found["usd"] = _cost(found)
    found["tenfold"] = _tenfold(found, config, options.network_gbps)
    found["warnings"] = _warnings(found, config, options.network_gbps)
    return found


def _signal(config: RunConfig, teacher: ModelSize) -> dict[str, Any]:
    described = TeacherDescription("", "", teacher.vocab_size, teacher.hidden_size, 0, 0, "")
    spec, reason = choose_signal(config.distill, described)
    size = spec.bytes_per_position(teacher.hidden_size)
    return {"kind": spec.kind, "bytes_per_position": size, "reason": reason}


def _student_flops(config: RunConfig, student: ModelSize, hidden_of: ModelSize | None) -> float:
    """Per token: three forward passes' worth, one more of the body where activations are computed again, and the
    teacher's head where hidden states travel."""
    length = config.data.sequence_length
    again = student.forward_flops(length, head=False) if config.train.gradient_checkpointing else 0.0
    return 3 * student.forward_flops(length) + again + (2 * hidden_of.head if hidden_of is not None else 0)


def _student_bytes(config: RunConfig, student: ModelSize) -> int:
    return (STUDENT_BYTES + (0 if config.train.precision == "float32" else 2)) * student.parameters


def _side(size: ModelSize, card: Card, cards: int, flops: float, utilisation: float, memory_b: int) -> dict[str, Any]:
    return {
        "parameters": size.parameters,
        "flops_per_token": flops,
        "card": asdict(card),
        "utilisation": utilisation,
        "card_tokens_per_s": card.bf16_tflops * 1e12 * utilisation / flops,
        "cards": cards,
        "nodes": math.ceil(cards / card.per_node),
        "memory_bytes": memory_b,
        "fits": memory_b <= ROOM * card.memory_gb * 1e9,
    }


def _pace(student: dict[str, Any], tokens: float, step_tokens: int, network_gbps: float) -> dict[str, Any]:
    """How fast the students go on their own: a step is its products, and then the gradients' way between nodes, each
    of which sends and takes `2 (n - 1) / n` times all of them."""
    nodes = student["nodes"]
    computed_s = step_tokens / (student["cards"] * student["card_tokens_per_s"])
    gradient_bytes = 2 * (nodes - 1) / nodes * 4 * student["parameters"]
    gradient_s = gradient_bytes * 8e-9 / network_gbps
    pace = step_tokens / (computed_s + gradient_s)
    return {
        "tokens": tokens,
        "tokens_per_s": pace,
        "hours": tokens / pace / 3600,
        "step_s": computed_s + gradient_s,
        "gradient_bytes": gradient_bytes,
        "gradient_share": gradient_s / (computed_s + gradient_s),
        "student": student | {"busy": computed_s / (computed_s + gradient_s)},
    }


def _cost(found: dict[str, Any]) -> float | None:
    """Dollars for whole nodes; None where a price is missing."""
    total = 0.0
    for side in (found["student"], found["teacher"]):
        if side is not None:
            price = side["card"]["usd_per_hour"]
            if price is None:
                return None
            total += price * side["nodes"] * side["card"]["per_node"] * found["hours"]
    return total


def _tenfold(found: dict[str, Any], config: RunConfig, network_gbps: float) -> dict[str, Any]:
    """The same config on ten times the cards: the batch is what it is, so a step's products take a tenth."""
    side = found["student"]
    more = side | {"cards": 10 * side["cards"], "nodes": math.ceil(10 * side["cards"] / side["card"]["per_node"])}
    step = config.train.global_batch * config.data.sequence_length
    then = _pace(more, found["tokens"], step, network_gbps)
    return {
        "student_cards": more["cards"],
        "hours": then["hours"],
        "gradient_share": then["gradient_share"],
        "rows_per_card": config.train.global_batch / more["cards"],
        "speed_up": then["tokens_per_s"] / found["tokens_per_s"],
    }


def _warnings(found: dict[str, Any], config: RunConfig, network_gbps: float) -> list[str]:
    """What will not go as it stands, each with what to do."""
    lines = []
    student, teacher, signal = found["student"], found["teacher"], found["signal"]
    for name, side in (("teacher", teacher), ("student", student)):
        if side is not None and not side["fits"]:
            lines.append(
                f"the {name} does not fit: {side['memory_bytes'] / 1e9:,.0f} GB on a {side['card']['name']} of "
                f"{side['card']['memory_gb']:,.0f} GB, and raystill does not cut a model over cards: take a larger "
                f"card (--{name}-card) or a smaller {name}"
            )
    if student["cards"] > config.train.global_batch:
        lines.append(
            f"{student['cards']} student cards share train.global_batch={config.train.global_batch} rows: "
            "some would never have one; raise it"
        )
    if found["gradient_share"] > 0.2:
        lines.append(
            f"gradients between nodes take {found['gradient_share']:.0%} of a step: raise train.global_batch, or take "
            "a faster network (--network-gbps)"
        )
    if signal is not None:
        heaviest = max(signal["gbps_per_student_node"], signal["gbps_per_teacher_node"])
        if heaviest > network_gbps:
            lines.append(
                f"the signal is {heaviest:,.1f} Gbit/s for a node, the network has {network_gbps:g}: "
                "distill.signal=topk or sampled is smaller"
            )
        assert config.teacher is not None
        highest = config.teacher.max_replicas or config.teacher.replicas
        if highest < teacher["cards"]:
            lines.append(
                f"the config allows {highest} teacher replicas where {teacher['cards']} keep up: students would wait "
                f"{1 - highest / teacher['cards']:.0%} of the time or more; set teacher.replicas={teacher['cards']}"
            )
    return lines
