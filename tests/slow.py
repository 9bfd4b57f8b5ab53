"""What `make test` leaves to `make test-all`, beside what is marked slow where it stands, so that it ends within 12 minutes.

Of a battery whose rows cost seconds each, `make test` keeps one or two that would show most faults; of whole runs and of
commands in processes of their own, those that a user meets first. Patterns are regular expressions that begin where a
test's name begins; one that matches nothing in its file is an error.
"""

SLOW: dict[str, tuple[str, ...]] = {
    "data/training_test.py": (
        r"test_every_source_trains\[(arrayrecord|huggingface|parquet|sourcecode|tfds)",
        "test_results_are_the_same_after_moving"),
    "decoding/engine_test.py": ("test_greedy_steps_equal_the_full_forward",),
    "experiments/commands_test.py": (
        "test_inspect_model", "test_sweep_runs", "test_generate",
        r"test_bad_input_is_one_line.*\[--config=(debug|text)",
        r"test_bad_input_is_one_line.*\[--prompt=a"),
    "experiments/ladder_test.py": (
        "test_the_prediction_is_of_the_best", "test_the_report_has_a_verdict", "test_the_default_ladder_is_long_enough",
        "test_bad_input_is_one_line"),
    "experiments/scaling_laws_test.py": ("test_fit_prints_a_table", r"test_bad_input_is_one_line\[arguments1"),
    "interop/trained_test.py": ("test_every_bit_comes_out",),
    "interop/huggingface_test.py": (r"test_logits_are_theirs\[(jamba|rwkv|mamba\]|mixtral|llama2|llama_tied|qwen3)",),
    "kernels/attention_test.py": (
        "test_inside_shard_map_and_remat", r"test_one_document_alone.*\[(flash|triton)",
        r"test_(matches_the_oracle|bfloat16_is_as_near_as_the_reference)\[.*-reference\]",
        r"test_a_query_that_sees_nothing.*\[(?!causal-chunked)"),
    "kernels/attention_ring_test.py": (r"test_equals_unsharded_attention\[.*triton",),
    "kernels/attention_tpu_test.py": (r"test_a_training_step_s_attention_compiles\[v5e",),
    "kernels/attention_flash_test.py": ("test_races_are_looked_for",),
    "kernels/chunks_pallas_test.py": ("test_a_sharded_training_step_for_four_chips", "test_flops_are_those"),
    "kernels/cross_entropy_test.py": ("test_forward_alone_gives_the_same",),
    "kernels/diagonal_ssm_test.py": (
        r"test_long_convolution\[(.*token|diagonal)", r"test_recurrence\[(dplr-reference|diagonal-chunked|diagonal-reference)",
        "test_what_is_gone_at_once"),
    "kernels/ssd_test.py": (r"test_oracle\[rows8-pallas-4", "test_bfloat16_is_near"),
    "models/adapters_test.py": ("test_gradients_reach_every_adapter", "test_every_weight_with_inputs"),
    "models/contract_test.py": (
        r"test_packed_is_standalone\[(Mamba2-chunks|GatedDelta-chunks_grouped)\]",
        r"test_(packed_is_standalone|parallel_is_prefill_is_steps)\[(H3|LatentAttention|Mamba-|Parallel|RgLru|Rwkv|S4)",
        "test_bfloat16_is_finite"),
    "models/encoder_decoder_test.py": ("test_packed_pairs_are_pairs_alone", "test_cached_decoding_is_teacher_forcing"),
    "models/gated_delta_test.py": (r"test_is_the_published_layer\[linear",),
    "models/heads_test.py": (r"test_four_devices_give_what_one_gives\[.*True",),
    "models/lm_test.py": (
        r"test_every_weight_gets_a_gradient\[(dense|post_norm|shared|sinus|recurrent|parallel)",
        "test_remat_gives_equal_gradients", "test_init_has_the_declared_scale", "test_bfloat16_compute",
        r"test_(packed_rows_and_cached_calls|scan_is_a_loop_over_layers)\[(dense_|post_norm|shared|sinus|recurrent|parallel)"),
    "models/mamba_test.py": (r"test_mamba2_is_that_of_transformers\[1", "test_steps_begin_as_published"),
    "models/moe_model_test.py": (
        r"test_whole_loss_on_four_devices\[(dp|fsdp|fsdp_tp|cp|ep|ep_4)\]", "test_capacity_drops",
        "test_statistics_inside_parallel"),
    "models/published_test.py": (r"test_latent_attention\[False",),
    "models/rwkv7_test.py": ("test_the_first_value_goes",),
    "models/s4_test.py": (r"test_convolution_is_recurrence\[H3",),
    "models/sharded_contract_test.py": (
        r"test_four_devices_give_what_one_gives\[((dp|fsdp|ep)-|(cp|fsdp_tp|ring)-(?!(Attention|Mamba2|Moe)\]))",),
    "params_test.py": (r"test_adapters_of_every_shape",),
    "presets_test.py": ("test_every_preset_is_listed",),
    "scaling/divergence_test.py": (r"test_one_diverged_run_is_found_among_much_noise\[scatter",),
    "scaling/planner_test.py": ("test_what_rests_on_the_hosts", "test_activations_know", "test_training_states_are_the_arrays"),
    "scaling/prediction_test.py": ("test_one_made_later_is_refused",),
    "scaling/extended_test.py": (r"test_the_law_comes_back.*\[repeated", "test_an_answer_at_a_budget"),
    "tools/aot_test.py": ("test_golden_by_the_command", r"test_golden\[(?!expert)"),
    "tools/benchmark_gpu_test.py": (
        r"test_every_part_runs.*\[(attention|decode|ssd|train)", r"test_the_training_step_lowers.*\[dots"),
    "tools/chaos_test.py": ("test_pieces_by_fault", "test_older_steps_are", "test_damage_comes", "test_a_disk_full_at_the_end"),
    "tools/compare_test.py": ("test_the_command",),
    "tools/data_tools_test.py": (r"test_train_tokenizer_gives",),
    "training/averaging_test.py": (
        "test_schedule_free_evaluates", "test_it_is_made_in_the_step", "test_a_run_evaluates", "test_bfloat16"),
    "training/branch_test.py": ("test_the_branch_points_are_kept", "test_a_branch_ends_as_the_whole_run_does"),
    "training/disk_full_test.py": ("test_a_run_survives_a_full_disk",),
    "training/goodput_test.py": ("test_killed_launches_are_accounted_for",),
    "training/metrics_test.py": ("test_the_trace_is_written",),
    "training/mirrors_test.py": ("test_a_run_is_announced",),
    "training/muon_test.py": ("test_adafactor_is_its_algorithm", "test_what_is_no_hidden_matrix"),
    "training/objectives_test.py": (
        r"test_four_devices_are_one\[(dp|fsdp_tp|cp|ring)", "test_the_step_accumulates",
        r"test_accumulation_is_exact.*\[preference", "test_the_frozen_reference"),
    "training/offload_test.py": ("test_layers_inputs", r"test_the_optimizers_state.*\[ada", "test_a_run_goes_there"),
    "training/optimizers_test.py": (
        r"test_it_trains_the_debug_preset\[(adafactor|lion|muon|schedule|sgd)",
        r"test_saved_and_restored.*\[(adafactor|lion|sgd)",
        r"test_four_devices_make_the_update_of_one\[(adafactor|lion|sgd)",
        r"test_(zero_gradient|state_is_sharded|a_step_has).*\[(adafactor|lion|muon|schedule)"),
    "training/reporting_test.py": ("test_the_experts_load", "test_a_learning_run_goes_on", "test_a_stopped_run_counts"),
    "training/resume_test.py": ("test_stopped_at_any_step_and_resumed", "test_sigterm_exits_with_75", "test_params_load"),
    "training/rollback_test.py": (
        r"test_a_passing_fault_leaves_no_trace\[nan_batch", "test_killed_anywhere", "test_a_hopeless_run"),
    "training/tpu_test.py": (
        r"test_the_step_compiles.*\[(dp|fsdp_tp|cp|ring|ep|ep_dropless|pallas)\]", "test_experts_are_not_gathered",
        "test_flash_attention_is_in_the_sharded_step", "test_memory_is_sharded"),
}
