"""A run of a matrix's numbers: which boxes it fills, and that a checkpoint of runs is a checkpoint of matrices."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver

from recipes.lib.flat_slices import FlatSlice, boxes
from recipes.lib.model import Transformer
from recipes.lib.pretrained import load_pretrained, size_of, to_hugging_face
from recipes.lib.staging import Stager
from tests.recipes.test_pretrained import CONFIG, weights_of, write_model

SHAPES = [(7,), (4, 3), (1, 5), (5, 1)]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_boxes_of_every_run_are_its_numbers_in_order(shape: tuple[int, ...]) -> None:
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    for start, end in itertools.combinations_with_replacement(range(whole.numel() + 1), 2):
        found = boxes(shape, start, end - start)
        parts = [
            whole[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))].flatten()
            for offsets, sizes in found
        ]
        assert torch.cat([torch.empty(0, dtype=torch.long), *parts]).tolist() == list(range(start, end))
        assert len(found) <= 3


def test_a_matrix_is_saved_in_runs_and_loaded_in_others(tmp_path: Path) -> None:
    """Runs that begin and end in the midst of rows, through the stager that lets a run go on while it saves."""
    flat = torch.arange(15.0)
    stager = Stager(torch.device("cpu"))
    staged = stager.stage({"a": FlatSlice((5, 3), 0, flat)}).result()
    flat.zero_()  # the next step
    state_dict_saver.save(staged, checkpoint_id=tmp_path / "saved", no_dist=True)
    stager.close()
    buffer = torch.full((8,), -1.0)
    state_dict_loader.load(
        {"a": FlatSlice((5, 3), 4, buffer)}, checkpoint_id=tmp_path / "saved", no_dist=True
    )
    assert buffer.tolist() == [4, 5, 6, 7, 8, 9, 10, 11]
    whole = torch.empty(5, 3)
    state_dict_loader.load({"a": whole}, checkpoint_id=tmp_path / "saved", no_dist=True)
    assert whole.flatten().tolist() == list(range(15))


def test_published_weights_are_read_into_runs(tmp_path: Path) -> None:
    """Into the second third of each tensor, as the middle one of three ranks has it."""
    folder = write_model(tmp_path / "llama", CONFIG)
    with torch.device("meta"):
        model = Transformer(size_of(CONFIG))
    kept, slices = {}, {}
    for name, parameter in model.named_parameters():
        room = -(-parameter.numel() // 3)
        kept[name] = torch.full((room,), -1.0)
        slices[name] = FlatSlice(parameter.shape, room, kept[name][: parameter.numel() - room])
    load_pretrained(model, folder, slices)
    for name, numbers in kept.items():
        whole = weights_of(CONFIG)[to_hugging_face(name)].float().flatten()
        assert torch.equal(numbers, whole[len(numbers) : 2 * len(numbers)]), name
