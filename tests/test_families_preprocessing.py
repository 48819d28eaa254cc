"""Pictures to tensors: every row of the originals' tables, and recorded pixels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from mstar_mega.models.families import internvl2, minicpm_v2_5, phi3_5_vision
from mstar_mega.models.families.internvl2 import InternVL2
from mstar_mega.models.families.minicpm_v2_5 import MiniCPMV25, Slicing
from mstar_mega.models.families.phi3_5_vision import Phi35Vision

GOLDENS = Path(__file__).parents[2] / "shared" / "goldens"
pytestmark = pytest.mark.skipif(not GOLDENS.is_dir(), reason="the originals' tables do not lie beside the project")


def table(name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((GOLDENS / name / "preprocess_table.json").read_text())["table"]
    assert len(rows) > 30
    return rows


def recorded(name: str) -> tuple[dict[str, Tensor], Image.Image, dict[str, Any]]:
    """(expected tensors, the picture, config.json) of the pixel case."""
    tensors = load_file(GOLDENS / name / "preprocess_pixels.safetensors")
    config = json.loads((GOLDENS / name / "config.json").read_text())
    return tensors, Image.fromarray(tensors["image"].numpy()), config


def grey_levels(pictures: list[Image.Image]) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).short()


def test_internvl2_tiles_every_size_as_the_original() -> None:
    for row in table("internvl2"):
        found = internvl2.tile_grid(row["width"], row["height"], row["max_num"], 448)
        assert found == (row["cols"], row["rows"]), row
        tiles = found[0] * found[1]
        assert tiles + (tiles > 1) == row["num_tiles"], row
        if row["max_num"] == 12:
            cost = InternVL2.published_image_cost(row["width"], row["height"])
            assert cost == (row["num_tiles"], 256 * row["num_tiles"]), row


def test_internvl2_pixels() -> None:
    expected, picture, config = recorded("internvl2")
    family = InternVL2.from_config({**config, "max_dynamic_patch": 6}, None)
    tiles = family.cut(picture)
    assert (grey_levels(tiles) - expected["tiles_uint8"].short()).abs().max() <= 1
    pixels = internvl2.normalised(tiles, internvl2.IMAGE_MEAN, internvl2.IMAGE_STD)
    torch.testing.assert_close(pixels, expected["pixel_values"], rtol=0, atol=1.01 / 255 / 0.224)


def test_phi3_5_vision_scales_every_size_as_the_original() -> None:
    config = {**json.loads((GOLDENS / "phi3_5_vision" / "config.json").read_text()), "img_processor": {}}
    family = Phi35Vision.from_config(config, None)
    assert (family.vision.image_size, family.vision.layers) == (336, 24), "CLIP's sizes are not in real configs"
    for row in table("phi3_5_vision"):
        width, height = row["width"], row["height"]
        upright = width < height
        new_width, _, padded = phi3_5_vision.hd_size(max(width, height), min(width, height), row["num_crops"], 336)
        found = [new_width, padded] if upright else [padded, new_width]
        assert found == row["image_size_hw"], row
        assert [side // 336 for side in found] == row["crops_hw"], row
        assert family.image_tokens(*row["crops_hw"]) == row["num_img_tokens"], row
        if row["num_crops"] == phi3_5_vision.NUM_CROPS:
            cost = Phi35Vision.published_image_cost(row["width"], row["height"])
            assert cost == (1 + row["crops_hw"][0] * row["crops_hw"][1], row["num_img_tokens"]), row


def test_phi3_5_vision_pixels() -> None:
    expected, picture, config = recorded("phi3_5_vision")
    family = Phi35Vision.from_config({**config, "num_crops": 4}, None)
    padded = phi3_5_vision.hd_image(picture, family.num_crops, family.vision.image_size)
    assert (grey_levels([padded])[0] - expected["hd_uint8"].short()).abs().max() <= 1
    pieces, rows, columns = family.cut(padded)
    assert [rows * 28, columns * 28] == expected["image_sizes"][0].tolist()
    assert family.image_tokens(rows, columns) == int(expected["num_img_tokens"])
    whole = torch.zeros_like(expected["pixel_values"][0])
    whole[: len(pieces)] = pieces
    torch.testing.assert_close(whole, expected["pixel_values"][0], rtol=0, atol=1.01 / 255 / 0.26)


def test_an_upright_picture_is_scaled_like_its_transpose() -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (61, 43, 3), dtype=np.uint8))
    turned = picture.transpose(Image.Transpose.TRANSPOSE)
    found, expected = (phi3_5_vision.hd_image(each, 4, 28) for each in (picture, turned))
    assert np.array_equal(np.asarray(found), np.asarray(expected).transpose(1, 0, 2))


def test_minicpm_v2_5_slices_every_size_as_the_original() -> None:
    for row in table("minicpm_llama3_v2_5"):
        width, height, slicing = row["width"], row["height"], Slicing(448, 14, row["max_slice_nums"])
        grid = minicpm_v2_5.slice_grid(width, height, slicing)
        assert list(minicpm_v2_5.source_size(width, height, slicing)) == row["source_size_wh"], row
        assert (list(grid) if grid else None) == row["grid_cols_rows"], row
        if grid:
            size = minicpm_v2_5.refined_size(width, height, grid, slicing)
            assert list(size) == row["slice_sizes_wh"], row
            assert grid[0] * grid[1] == row["n_slices"], row
        if row["max_slice_nums"] == 9:
            pieces = 1 + (grid[0] * grid[1] if grid else 0)
            assert MiniCPMV25.published_image_cost(width, height) == (pieces, 96 * pieces), row


def test_minicpm_v2_5_pixels() -> None:
    expected, picture, config = recorded("minicpm_llama3_v2_5")
    family = MiniCPMV25.from_config({**config, "slice_config": {"scale_resolution": 28, "max_slice_nums": 9}}, None)
    assert family.slicing == Slicing(28, 7, 9)
    source, rows = minicpm_v2_5.cut(picture, family.slicing)
    pieces = [source, *(piece for row in rows for piece in row)]
    assert len(pieces) == len(expected["tgt_sizes"])
    for k, piece in enumerate(pieces):
        assert [piece.height // 7, piece.width // 7] == expected["tgt_sizes"][k].tolist()
        patches = minicpm_v2_5.to_patches(piece, 7)
        strip = patches.permute(1, 2, 0, 3).flatten(2)
        torch.testing.assert_close(strip, expected[f"pixel_values.{k}"], rtol=0, atol=1.01 / 127.5)
