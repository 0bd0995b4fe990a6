"""``train``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import click

from flipkd.cli.guard import OneValueCommand
from flipkd.cli.options import F, common_options, print_values, run_options, set_up_logging, take_run
from flipkd.distill.config import OBJECTIVES, LossOptions, TrainConfig
from flipkd.models.options import LINEAR_LAYERS, STUDENT_POOLINGS, StudentOptions

_HELP = {
    "layer": "k: blocks 0..k-1 are run. Default: a quarter of the depth.",
    "dimension": "Rank of layer k's A: the size of a vector.",
    "rank": "LoRA rank of the linear layers below.",
    "alpha": "LoRA's alpha.",
    "dropout": "Dropout of LoRA's input.",
    "max_length": "Most tokens per text.",
    "whole_tower": "Load all blocks, with LoRA in each, for the language model's loss.",
    "prompt_version": "Which question the language model's loss asks; 2 shares more of it between pairs.",
    "trust_remote_code": "Let Python code in the student's folder run.",
    "weight_mcl": "Weight of the margin-aware contrastive loss.",
    "weight_pairs": "Weight of the squared error to the teacher over the pairs.",
    "weight_matrix": "Weight of the KL to the teacher over the in-batch matrix.",
    "weight_infonce": "Weight of InfoNCE: a match against all other texts of the batch.",
    "weight_lm": "Weight of the language model's loss; more than 0 needs --whole-tower.",
    "margin_between": "Margin between a positive and a negative.",
    "margin_within": "Margin inside a class, times the difference of the teacher's scores.",
    "temperature": "Temperature of the margin-aware contrastive loss and of InfoNCE.",
    "matrix_temperature": "Temperature of the in-batch matrix.",
    "positive_threshold": "Positives that the teacher scores lower are noise.",
    "negative_threshold": "Negatives that the teacher scores higher are noise.",
    "validation": "Pairs to validate on, as --pairs. Default: some of --pairs are held out.",
    "validation_fraction": "Left texts that are held out where there is no --validation.",
    "unlabelled": "More pairs with teacher scores, for the losses that need no label; their labels are ignored.",
    "unlabelled_batch_pairs": "Of them in one batch, beside --batch-pairs.",
    "left_text": "Column of left texts. Default: what teach recorded, else left_text.",
    "right_text": "Column of right texts.",
    "label_column": "Column of labels, null for unlabelled. Default: label, if there is one.",
    "steps": "Optimizer steps.",
    "batch_pairs": "Pairs in one batch, over all workers.",
    "accumulate": "Batches in one step, which takes the mean of their gradients.",
    "learning_rate": "Highest learning rate.",
    "warmup_fraction": "Part of the steps with a rising learning rate.",
    "weight_decay": "AdamW's weight decay.",
    "max_gradient_norm": "Gradients are scaled down to this norm.",
    "max_tokens": "Tokens in one pass through the blocks; bounds memory, does not change the result.",
    "gradient_checkpointing": "Forget activations and compute them again backwards.",
    "evaluate_every": "Steps between validations.",
    "checkpoint_every": "Steps between checkpoints.",
    "keep_checkpoints": "Checkpoints that are kept.",
    "patience": "Validations without a better value after which training stops.",
    "seed": "Of LoRA's start, the order of pairs, and dropout.",
    "log_every": "Steps between lines of metrics.",
    "device": "cpu, cuda or auto.",
}
_CHOICES = {
    "dtype": (("float32", "bf16"), "What the blocks compute in."),
    "projection": (("q", "k", "v"), "Whose A of layer k is read."),
    "pooling": (tuple(STUDENT_POOLINGS), "Over a text's tokens."),
    "attention": (("causal", "full"), "Of blocks that encode; full: a token sees those after it too."),
    "start": (("whitened", "random"), "Where A of layer k starts."),
    "objective": (OBJECTIVES, "What is minimised; all but flip are for comparison."),
}
_TYPES = {"int": int, "float": float, "str": str, "int | None": int, "str | None": str, "bool": bool}
_SKIPPED = ("folder", "target_modules", "pairs", "output", "student", "loss", "run")


def _field_options(kind: type) -> Callable[[F], F]:
    """One flag per field, with the field's own default: they cannot drift apart."""

    def decorate(function: F) -> F:
        for item in reversed(fields(kind)):
            flag = f"--{item.name.replace('_', '-')}"
            if item.name in _SKIPPED:
                continue
            if item.name in _CHOICES:
                known, text = _CHOICES[item.name]
                option = click.option(
                    flag, type=click.Choice(known), default=item.default, show_default=True, help=text
                )
            elif item.type == "bool":
                option = click.option(flag, is_flag=True, default=item.default, help=_HELP[item.name])
            else:
                shown = item.default is not None
                kinds = _TYPES[str(item.type)]
                option = click.option(flag, type=kinds, default=item.default, show_default=shown, help=_HELP[item.name])
            function = option(function)
        return function

    return decorate


@click.command(cls=OneValueCommand)
@click.option(
    "--student",
    required=True,
    help="A Hugging Face decoder, folder or hub name: Llama, Qwen2, Qwen3, Mistral or Gemma.",
)
@click.option("--pairs", required=True, help="Output of teach: Parquet with texts, teacher scores, labels.")
@click.option("--output", required=True, help="Folder of the run.")
@click.option("--target-modules", default=",".join(LINEAR_LAYERS), show_default=True, help="Linear layers with LoRA.")
@_field_options(StudentOptions)
@_field_options(LossOptions)
@_field_options(TrainConfig)
@run_options
@common_options
def train(as_json: bool, log_level: str, student: str, target_modules: str, **options: Any) -> None:
    """Train a student on the teacher's scores.

    The LoRA of a decoder learns; export makes an encoder of it.
    """
    set_up_logging(log_level)

    def take(kind: type) -> dict[str, Any]:
        return {item.name: options.pop(item.name) for item in fields(kind) if item.name in options}

    run = take_run(options)
    modules = tuple(name.strip() for name in target_modules.split(",") if name.strip())
    config = TrainConfig(
        student=StudentOptions(folder=student, target_modules=modules, **take(StudentOptions)),
        loss=LossOptions(**take(LossOptions)),
        run=run,
        **options,
    )
    from flipkd.distill.train import train as run_training

    found = run_training(config)
    if as_json:
        print_values(found, as_json)
        return
    shown = ", ".join(f"{name} {value:.4f}" for name, value in (found["validation"] or {}).items())
    click.echo(f"train: {found['steps']} steps; best at step {found['best_step']}: {shown}; in {found['output']}")
