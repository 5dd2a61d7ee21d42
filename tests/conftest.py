"""Precision: every test runs in JAX's default float32 unless it asks for float64, and both run in one process."""

import contextlib
import gc
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from registry import REGISTRY

# Compilation is nine tenths of the test time. Without XLA's newer emitters of CPU kernels, and without LLVM's
# optimization, it takes half of it. Whoever sets an option decides: .ci/run has the slow tests optimized, and those of
# the oldest versions compiled as users do; so are the examples. An unknown flag would end the process: later versions
# may lack that of the emitters.
OPTIONS = {"xla_backend_optimization_level": "0"}
if jax.__version_info__ < (0, 11):
    OPTIONS["xla_cpu_use_fusion_emitters"] = "false"
for name, value in OPTIONS.items():
    if name not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{name}={value}".strip()


# Products in the tests' own losses at full precision: accelerators round their factors otherwise.
if jax.default_backend() != "cpu":
    jax.config.update("jax_default_matmul_precision", "highest")


@contextlib.contextmanager
def float64(enabled: bool = True) -> Iterator[None]:
    """Switch 64-bit types on, or off, inside the context; what was compiled in the other precision stays apart.

    For the whole process, as users do: `jax.enable_x64` speaks for one thread, and JAX calls back from another.
    """
    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", enabled)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


@pytest.fixture(autouse=True)
def _precision(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run tests marked `x64` in float64."""
    if request.node.get_closest_marker("x64") is None:
        yield
        return
    with float64():
        yield


# Every compiled program maps memory. Linux allows a process 65,530 maps, and a compilation beyond them crashes.
MOST_MAPS, LOOK_EVERY = 35_000, 20
TESTS = pytest.StashKey[int]()


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Drop compiled programs where they come near to what a process may map; looked at after every 20th test."""
    item.session.stash[TESTS] = done = item.session.stash.get(TESTS, 0) + 1
    maps = Path("/proc/self/maps")
    if done % LOOK_EVERY == 0 and maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()
        gc.collect()


# Cases that take seconds of compilation each and repeat, for another optimizer or precision, what a default case shows.
REPEATS = (
    "to_the_last_bit[cubic_newton-float32]",
    "changes_the_first_accepted_points_by_rounding_in_float32[cubic_newton",
    "newton_levenberg-float32]",
    "newton_modified_cholesky-float32]",
    "saddle_free_newton-float32]",
    "compile_once_and_are_those_of_a_lane_of_a_scan[newton, trust region]",
    "masked-saddle_free_newton]",
    "test_an_overflow_on_the_way_is_a_wall[saddle_free_newton",
    "test_an_overflow_on_the_way_is_a_wall[newton_modified_cholesky",
    "test_an_overflow_on_the_way_is_a_wall[newton_levenberg",
    "test_a_logarithm_is_minimized_although_the_first_steps_leave_its_domain[saddle_free_newton",
    "test_a_logarithm_is_minimized_although_the_first_steps_leave_its_domain[newton_modified_cholesky",
    "compile_once_and_are_those_of_a_lane_of_a_scan[newton, line search]",
    "compile_once_and_are_those_of_a_lane_of_a_scan[newton, shift]",
    "compile_once_and_are_those_of_a_lane_of_a_scan[saddle_free_newton]",
    "test_a_thousand_rosenbrock_lanes_need_few_batched_calls[lbfgs-132-float32]",
    "test_a_thousand_rosenbrock_lanes_need_few_batched_calls[bfgs-150-float32]",
    "test_every_lane_ends_as_it_does_alone[newton_modified_cholesky]",
    "test_every_lane_ends_as_it_does_alone[saddle_free_newton]",
    "test_whole_iterations_are_the_accepted_points_of_one_evaluation_at_a_time[newton, shift]",
    "test_whole_iterations_are_the_accepted_points_of_one_evaluation_at_a_time[newton, line search]",
    "unreachable_tolerance_ends_as_stalled_near_the_minimum[float64-newton_modified_cholesky]",
    "unreachable_tolerance_ends_as_stalled_near_the_minimum[float64-newton_levenberg]",
    "unreachable_tolerance_ends_as_stalled_near_the_minimum[float64-saddle_free_newton]",
    "a_small_gradient_with_a_true_status[newton_modified_cholesky]",
    "a_nan_gradient_is_rejected[newton_modified_cholesky",
    "unreachable_tolerance_ends_as_stalled_near_the_minimum[float32-newton_",
    "unreachable_tolerance_ends_as_stalled_near_the_minimum[float32-saddle_free_newton]",
    "a_small_gradient_with_a_true_status[saddle_free_newton]",
    "[gauss_newton]",  # its loop is that of newton, line search, and its curvature that of levenberg_marquardt
    "-gauss_newton]",
    "[multi_transform-levenberg_marquardt]",
    "[masked-levenberg_marquardt]",
    "test_a_donated_state_gives_the_same_points[levenberg_marquardt]",
    "test_multi_steps_over_equal_losses_moves_every_second_time[levenberg_marquardt]",
    "test_mixed_precision_is_optimized_to_the_precision_of_each_leaf[levenberg_marquardt]",
    "test_fifty_eager_iterations_compile_once_and_are_those_of_a_lane_of_a_scan[levenberg_marquardt]",
    "test_new_data_in_extra_arguments_compile_nothing[levenberg_marquardt]",
    "test_identities_around_it_and_a_watch_for_non_finite_gradients_change_nothing[levenberg_marquardt]",
    "test_a_tree_is_optimized_like_the_vector_of_its_entries[levenberg_marquardt]",
    "test_a_program_gives_the_same_numbers_before_and_after",  # .ci/run runs the programs, too
    "test_saddle_free_lanczos.py::test_every_lane_of_vmap_runs_as_if_alone",
    "test_a_gauss_newton_product_makes_it_the_gauss_newton_method",
    "test_the_inverse_of_the_hessian_as_preconditioner_leaves_one_product_per_solve",
    "test_it_minimizes_rosenbrock_as_newton_does[50]",
    "test_lbfgs_reduces_three_times_whatever_m_is[5]",
    "test_a_run_resumes_where_it_stopped",
    "test_vertices_fixed_parameters_and_kkt_points_are_answers",
    "test_are_fitted_in_fewer_evaluations_than_from_scratch",
    "test_the_jacobian_is_the_same_by_rows_and_by_columns_and_lane_by_lane",
    "test_unrolled_updates_differentiate_over_lanes[lbfgs]",
    "test_units_of_the_loss_change_nothing[1.0]",
    "test_units_of_the_loss_change_nothing[1e+25]",
    "test_a_stall_leaves_nothing_that_steepest_descent_could_gain[newton_cg]",
    "test_a_stall_leaves_nothing_that_steepest_descent_could_gain[cubic_newton]",
    "test_a_stall_leaves_nothing_that_steepest_descent_could_gain[sr1]",
    "test_the_default_truncates_where_the_jacobian_is_far_from_full_rank[20-True]",
    "test_residuals_that_round_coarsely_do_not_hide_the_others[normal_equations]",
    "test_a_point_whose_jacobian_is_not_finite_is_a_wall[shifted]",
    "test_a_point_whose_jacobian_is_not_finite_is_a_wall[iterative]",
    "test_a_point_whose_jacobian_is_not_finite_is_a_wall[truncated]",
    "test_a_loss_that_underflows_is_no_minimum[iterative]",
    "test_data_that_a_compiled_function_closes_over_are_checked_as_ever[none]",
    "test_a_wrapped_run_resumes_like_a_bare_one[chain-newton]",
    "test_a_wrapped_run_resumes_like_a_bare_one[chain-cubic]",
    "test_a_wrapped_run_resumes_like_a_bare_one[track-lbfgs]",
    "test_a_wrapped_run_resumes_like_a_bare_one[track-cubic]",
    "test_updates_of_many_lanes_by_an_eager_vmap_compile_once[bfgs]",
    "test_the_loop_turns_as_often_as_the_slowest_lane_evaluates[saddle_free_newton]",
    "test_lobpcg_has_an_answer_with_an_honest_residual[2-identity]",
    "test_lobpcg_has_an_answer_with_an_honest_residual[1-zero]",
    "[an accelerator-jit]",
    "[an accelerator-vmap of vmap]",
    "[an accelerator-map]",
    "[an accelerator-jacfwd]",
    "[an accelerator-hessian]",
    "[an accelerator-vmap of hessian]",
    "test_the_leaves_are_those_of_ravel_pytree[7]",
    "test_the_first_scaling_has_a_lower_limit[convex]",
    "test_faults_in_every_kth_evaluation_leave_finite_parameters_and_a_true_status[newton_cg, pairs-",
    "test_a_wrapped_run_resumes_like_a_bare_one[track-newton]",
)


# Of these tests the cases of every variant in the registry are slow: another setting of an optimizer that is covered.
SAME = tuple(entry.name for entry in REGISTRY.values() if entry.repeat)
VARIANTS = tuple(entry.name for entry in REGISTRY.values() if entry.variant)
SLOW_FOR_VARIANTS = (
    "test_objectives_without_an_ordinary_minimum_end_with_the_right_status",
    "test_every_lane_of_vmap_runs_as_if_alone",
    "test_fifty_eager_updates_compile_once_and_give_the_points_of_a_scan",
    "test_fifty_eager_iterations_compile_once",
    "test_whole_iterations_end_on_the_finite_side_of_a_fence",
    "test_a_non_finite_trial_is_rejected_and_the_run_recovers",
    "test_jitted_updates_give_the_points_of_a_scan",
    "test_a_tree_is_optimized_like_the_vector_of_its_entries",
    "test_frozen_parameters_stay_and_the_others_move_as_if_alone",
    "test_faults_in_every_kth_evaluation_leave_finite_parameters_and_a_true_status",
    "test_whole_iterations_are_the_accepted_points_of_one_evaluation_at_a_time",
    "test_the_accepted_point_was_shown_and_its_loss_never_rises",
    "test_mixed_precision_is_optimized_to_the_precision_of_each_leaf",
    "test_multi_steps_over_equal_losses_moves_every_second_time",
    "test_new_data_in_extra_arguments_compile_nothing",
    "test_a_saddle_without_gradient_is_left_by_those_that_know_the_curvature",
    "test_identities_around_it_and_a_watch_for_non_finite_gradients_change_nothing",
    "test_a_donated_state_gives_the_same_points",
)
# In these files the driver and its loop are what is tested; they are the same for newton with any damping.
FILES_OF_THE_DRIVER = ("tests/test_minimize.py", "tests/test_failures.py")
OTHER_NEWTONS = ("newton_levenberg", "newton_modified_cholesky", "saddle_free_newton")


def _is_of(nodeid: str, names: tuple[str, ...]) -> bool:
    return nodeid.endswith(tuple(f"{before}{name}]" for name in names for before in "[-"))


def _is_repeat(nodeid: str) -> bool:
    variant = _is_of(nodeid, VARIANTS) and any(test in nodeid for test in SLOW_FOR_VARIANTS)
    file, _, case = nodeid.partition("::")
    newton = file.endswith(FILES_OF_THE_DRIVER) and any(name in case.partition("[")[2] for name in OTHER_NEWTONS)
    return variant or newton or _is_of(nodeid, SAME) or any(name in nodeid for name in REPEATS)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the repeats slow; skip tests marked `gpu` where JAX finds no accelerator."""
    for item in items:
        if _is_repeat(item.nodeid):
            item.add_marker(pytest.mark.slow)
    if jax.default_backend() != "cpu":
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an accelerator; JAX found none"))
