"""`peft-quant merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import prepare, say
from .options import Config, PushToHub


def merge(
    base: Annotated[str, typer.Argument(help="GPTQ checkpoint the adapter was trained on: directory or Hub id.")],
    adapter: Annotated[str, typer.Argument(help="PEQA adapter: directory or Hub id.")],
    out: Annotated[Path, typer.Argument(help="Directory to write, which must not exist.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and print what would be written, but write nothing.")
    ] = False,
    allow_clamped_scales: Annotated[
        bool,
        typer.Option(
            "--allow-clamped-scales",
            help="Merge even if training drove 1 % of a layer's scales or more to the limits of their dtype.",
        ),
    ] = False,
    push_to_hub: PushToHub = None,
    config: Config = None,
) -> None:
    """Merge a PEQA adapter into its GPTQ checkpoint."""
    prepare()
    from ..export.merge import plan_merge

    plan = plan_merge(base, adapter, out, allow_clamped_scales=allow_clamped_scales)
    changed = f"{len(plan.deltas)} scales"
    if plan.others:
        changed += f" and {len(plan.others)} tensors of modules_to_save"
    if dry_run:
        say(f"would write {out}, {sum(plan.files.values()) / 1e6:.1f} MB, with other values in {changed}:")
        for name, size in plan.files.items():
            say(f"  {name}  {size / 1e6:.1f} MB")
        if push_to_hub:
            say(f"would push it to {push_to_hub}")
        return
    plan.write()
    say(f"the merged checkpoint is in {out}: the base with other values in {changed}")
    if push_to_hub:
        from huggingface_hub import create_repo, upload_folder

        from ..export.card import write_model_card

        repository = create_repo(push_to_hub, exist_ok=True).repo_id
        write_model_card(out, repository=repository)
        upload_folder(repo_id=repository, folder_path=out)
        say(f"pushed to {repository}")
