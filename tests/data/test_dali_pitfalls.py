"""What DALI does differently from what a training run needs: each trap with the tests that would notice it."""

from __future__ import annotations

import importlib
import inspect

import numpy as np
import pytest
import torch

from tests.data.pictures import make_set, needs_dali

needs_dali()

from ltfast.data import dali_pipeline  # noqa: E402

PITFALLS: dict[str, tuple[str, ...]] = {
    "random_shuffle moves pictures within a window only": (
        "test_webdataset.test_dalis_reader_accepts_the_index_but_keeps_neighbours_together",
        "test_large_source.test_the_order_of_a_class_sorted_list_is_uniform_for_every_epoch_and_rank",
    ),
    "shuffle_after_epoch ignores the pipeline's seed": (
        "test_large_source.test_the_order_depends_on_the_seed_from_the_first_epoch_on",
    ),
    "shards run into one another unless padded": (
        "test_large_source.test_an_epoch_holds_every_image_and_the_fill_is_its_head",
        "test_large_source.test_ranks_share_each_global_batch",
    ),
    "color_twist pulls contrast towards 128": ("test_color.test_contrast_pulls_towards_the_pictures_own_gray_not_128",),
    "hue is a rotation in YIQ, in degrees": ("test_color.test_hue_is_in_turns_of_hsv_not_in_degrees_nor_yiq",),
    "EXIF rotation is on": ("test_dali_source.test_odd_files_decode_alike_and_exif_is_not_applied",),
    "antialiasing and regions of interest": ("test_dali_source.test_both_paths_show_the_same_pictures",),
    "RandAugment: other bins, linear interpolation, fill 128": (
        "test_randaugment.test_every_operation_equals_timms",
        "test_randaugment.test_magnitude_ten_is_not_torchvisions_ten",
    ),
    "seeds hang on the graph; coin_flip knows no float": (
        "test_dali_source.test_no_random_number_is_drawn_by_dali",
        "test_dali_source.test_flips_are_those_drawn",
    ),
    "conditionals need the source file, pipeline_def refuses **kwargs": (
        "test_dali_pitfalls.test_a_graph_made_by_exec_with_keywords_runs",
    ),
    "one bad file ends the pipeline, without its name": (
        "test_large_source.test_a_bad_file_is_replaced_and_named_once",
        "test_large_source.test_several_bad_files_even_in_one_batch",
        "test_dali_source.test_a_file_that_only_dali_refuses_is_found",
    ),
    "a region of a truncated file may decode": ("test_large_source.test_a_bad_file_is_replaced_and_named_once",),
    "errors surface early, because of prefetching": (
        "test_dali_source.test_labels_follow_the_substitute_when_prefetch_ran_ahead",
    ),
    "labels are int32 of shape (B, 1)": ("test_large_source.test_attributes_shapes_and_types",),
    "reset() in mid-epoch is ignored": ("test_large_source.test_resume_gives_exactly_the_remaining_images",),
    "a changed batch size is accepted by its checkpoint": (
        "test_large_source.test_identity_is_plain_values_and_a_changed_batch_is_caught",
    ),
    "GPU upsampling of chroma differs": (
        "test_dali_pitfalls.test_the_decoder_is_told_what_its_defaults_get_wrong",
        "test_dali_source.test_gpu_pictures_equal_cpu_pictures",
    ),
    "named arguments must be CPU values": ("test_dali_source.test_the_gpu_graph_can_be_defined",),
    "no bfloat16": ("test_torch_source.test_views_rounded_by_autocast_are_nearer_than_arithmetic_in_bfloat16",),
    "outputs without a copy": ("test_dali_source.test_kept_batches_stay_as_they_were",),
    "a pipeline collected in a forked worker hangs it": (
        "test_dali_source.test_a_dropped_source_frees_its_pipelines_without_the_garbage_collector",
        "test_torch_source.test_workers_leave_the_parents_garbage_alone",
    ),
}


@pytest.mark.parametrize("pitfall", PITFALLS)
def test_the_tests_of_a_pitfall_exist(pitfall: str) -> None:
    for name in PITFALLS[pitfall]:
        module, function = name.split(".")
        assert callable(getattr(importlib.import_module(f"tests.data.{module}"), function)), name


def test_the_decoder_is_told_what_its_defaults_get_wrong() -> None:
    for device_id, device in ((None, "cpu"), (0, "mixed")):
        options = dali_pipeline._decoder(device_id)
        assert options == {"device": device, "adjust_orientation": False, "jpeg_fancy_upsampling": True}


def test_a_graph_made_by_exec_with_keywords_runs(tmp_path) -> None:
    """No source file, no pipeline_def: the graph is built by plain calls, with conditions as arithmetic."""
    root = make_set(tmp_path, (1,), val=1)
    path = np.frombuffer(str(root / "train/0/0.jpg").encode(), dtype=np.uint8)
    draws = np.full((1, 1, dali_pipeline.CROP_TRIES), 0.5)
    inputs = [path], draws, draws, np.zeros((1, 1, 2)), np.zeros((1, 1), dtype=np.float32), np.zeros(1, dtype=np.int64)
    scope = {"make": dali_pipeline.train_pipeline, "inputs": inputs}
    exec("def build(**options):\n    return make(lambda info: inputs, **options)", scope)
    options = {"views": 1, "loose": True, "image_size": 16, "batch": 1, "threads": 1, "device_id": None}
    pipeline = scope["build"](**options)  # type: ignore[operator]
    pipeline.build()
    picture, index = (torch.from_dlpack(output.as_tensor()) for output in pipeline.run())
    assert picture.shape == (1, 16, 16, 3)
    assert index.tolist() == [0]
    assert "enable_conditionals" not in inspect.getsource(dali_pipeline)
