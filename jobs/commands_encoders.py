"""The command about encoders and classifiers, which need no run: quantize-encoder."""

import json
from pathlib import Path
from typing import Annotated

import typer

from jobs.arguments import AsJson, Guard


def add_encoder_commands(app: typer.Typer, guard: Guard) -> None:
    """Adds this command to the program."""

    @app.command("quantize-encoder")
    def quantize_encoder(
        model: Annotated[str, typer.Argument(metavar="MODEL", help="Directory of an encoder or classifier.")],
        into: Annotated[Path, typer.Argument(metavar="INTO", help="Directory for the artefacts, one folder each.")],
        rows: Annotated[Path, typer.Option(metavar="FILE", help="Texts to measure with, .parquet or .jsonl.")],
        scheme: Annotated[
            list[str] | None,
            typer.Option(
                metavar="SCHEME",
                help="int8_weight_only, int8_dynamic, onnx_int8 (these by default), onnx_int4, onnx_float32; may be "
                "given again.",
            ),
        ] = None,
        text_column: Annotated[str, typer.Option(metavar="NAME", help="Where the rows have their texts.")] = "text",
        label_column: Annotated[
            str | None, typer.Option(metavar="NAME", help="Of a classifier's rows: whole numbers from 0.")
        ] = None,
        max_rows: Annotated[int, typer.Option(min=1, metavar="N", help="Read no more rows than these.")] = 2000,
        as_json: AsJson = False,
    ) -> None:
        """Quantise an encoder or a classifier, reload each artefact in a fresh process, compare and measure it."""

        def work() -> None:
            from rich.console import Console
            from transformers.utils.logging import disable_progress_bar

            from cluster.resources import physical_cores
            from jobs.progress import ConsoleProgress
            from jobs.quantize_encoder import REPORT, SCHEMES, read_rows
            from jobs.quantize_encoder import quantize_encoder as quantise
            from jobs.tables import encoders_table

            schemes: list[str] = [*dict.fromkeys(scheme or SCHEMES)]
            texts, labels = read_rows(rows, text_column, label_column, max_rows)
            disable_progress_bar()  # of loading and saving a model, beside our own
            with ConsoleProgress() as progress:
                bar = progress.stage("quantize")

                def report(done: int, note: str) -> None:
                    if done == 0:
                        bar.start(1 + len(schemes), note)
                    else:
                        bar.update(done, note)

                found = quantise(model, into, schemes, texts, labels, physical_cores(), report)
            if as_json:
                typer.echo(json.dumps(found, sort_keys=True))
            else:
                Console().print(encoders_table(found, into))
                typer.echo(f"report in {into / REPORT}")

        guard(work, as_json)
