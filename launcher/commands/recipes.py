"""`recipes`: the table of what can be run."""

from __future__ import annotations

import argparse
import json

from launcher.recipes import load_recipes


def run(options: argparse.Namespace) -> int:
    entries = load_recipes()
    if options.json:
        facts = [
            {
                "name": entry.name,
                "chapter": entry.chapter,
                "summary": entry.summary,
                "entrypoint": entry.entrypoint,
                "max_world_size": entry.max_world_size,
                "file": entry.file,
            }
            for entry in entries
        ]
        print(json.dumps(facts, indent=2, ensure_ascii=False))
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("recipe", no_wrap=True)
    table.add_column("what it shows")
    table.add_column("chapter", justify="right")
    for entry in entries:
        table.add_row(entry.name, entry.summary, str(entry.chapter))
    console = Console()
    console.print(table)
    console.print("\nrun one: python -m launcher submit recipe=NAME", highlight=False)
    return 0
