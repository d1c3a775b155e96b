"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

KINDS = "favor_plus, favor_sharp, lara or eva"
FORMATS = "txt, parquet, jsonl, json, csv, tsv"

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Hub name or folder.", show_default=False)]
Output = Annotated[
    Path, typer.Argument(metavar="OUT", help="Folder to save into; a new or an empty one.", show_default=False)
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Save into OUT although there is something in it.")]
Revision = Annotated[str, typer.Option(help="Branch, tag or commit of MODEL on the Hub.")]
Device = Annotated[str | None, typer.Option(help="Such as cpu or cuda.", show_default="a GPU if there is one")]
Dtype = Annotated[str, typer.Option(help="Of the weights: auto (as saved), float32, bfloat16 or float16.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="A setting of the kind, such as window_size=64. Repeatable."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and everything else to stderr.")]

# -- inputs -----------------------------------------------------------------------------------------------------------
Inputs = Annotated[
    list[str],
    typer.Option(
        "--inputs",
        metavar="PATH",
        help=f"Texts ({FORMATS}) or images (parquet, or a folder of them). A pattern with * and hf://datasets/... work"
        " too. Repeatable.",
        show_default=False,
    ),
]
Column = Annotated[str | None, typer.Option(help="Column of the texts or images.", show_default="the usual names")]
MaxLength = Annotated[int | None, typer.Option(min=1, help="Tokens of a row.", show_default="the model's positions")]
Pack = Annotated[
    bool, typer.Option("--pack/--no-pack", help="Join texts and cut them into rows, or make a row of every text.")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Rows at a time.")]
Tokenizer = Annotated[
    str | None, typer.Option(help="Tokenizer or image processor, if it is not with MODEL.", show_default="MODEL")
]
