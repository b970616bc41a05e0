"""
can the tests of what is promised fail (tests/README.md)? each control plants one bug in a copy of the sources and runs the test that must
turn red. usage: python bench/controls.py [words of a name, file or test], 20 minutes on 2 cpu cores. exit code 1 if a bug went unseen.
"""
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
KILLS = 'test_reliability.py::test_a_kill_before_and_after_each_filesystem_call_of_a_save_loses_nothing'
LM_CLASSES = 'test_finetune.py::test_every_class_trains_and_decodes_with_caches_as_without'
CONTROLS = [ # name, file, line, what it becomes, the test
    ("an epoch without the walk", 'data.py', "        if i < n: #", "        if True: #", 'test_promises.py::test_an_epoch_is_a_permutation_at_any_size'),
    ("an epoch begins one late", 'data.py', "np.divmod(t, n)", "np.divmod(t + U(1), n)", 'test_promises.py::test_every_target_comes_once_an_epoch_times_its_repeat'),
    ("seed + epoch", 'data.py', "hash64(self.seed, EPOCH, epoch)", "hash64(self.seed + epoch, EPOCH)", 'test_promises.py::test_no_two_seeds_or_epochs_share_a_stream'),
    ("another number of rounds", 'data.py', "for k in range(4):\n            left", "for k in range(6):\n            left", 'test_promises.py::test_the_order_is_the_one_that_it_always_was'),
    ("resuming by fast-forward", 'data.py', "        self.window, self.batch = state['window']", "        [self.rows(w) for w in range(min(state['window'], 9))]\n        self.window, self.batch = state['window']",
     'test_promises.py::test_resuming_costs_one_plan_wherever_it_is'),
    ("augments from a global generator", 'data.py', "self.copy[i].astype(U)\n", "self.copy[i].astype(U) + U(np.random.randint(8))\n", 'test_promises.py::test_every_place_can_be_gone_back_to'),
    ("batches that are not part of the state", 'data.py', "'batch': self.batch, 'seed'", "'batch': 0, 'seed'", 'test_promises.py::test_every_place_can_be_gone_back_to'),
    ("ranks that cut off the rest", 'data.py', "        a, b = split(r1 - r0, self.rank, self.world)\n        buffers", "        a, b = [(r1 - r0) // self.world * r for r in (self.rank, self.rank + 1)]\n        buffers",
     'test_promises.py::test_one_two_four_three_ranks_see_the_same_global_stream'),
    ("ranks that draw for themselves", 'data.py', "        rows = self.rows(place[0])\n", "        rows = self.rows(place[0] + self.rank)\n", 'test_promises.py::test_any_number_of_ranks_sees_the_same_global_stream'),
    ("batches that are kept", 'data.py', "        self.turn = (turn + 1) % 3\n", "        self.turn = (turn + 1) % 3\n        self.__dict__.setdefault('kept', []).append(batch.idx.clone())\n",
     'test_promises.py::test_memory_stays_flat_over_100_000_batches'),
    ("a ring of two", 'data.py', "self.turn = (turn + 1) % 3", "self.turn = (turn + 1) % 2", 'test_promises.py::test_a_batch_is_valid_until_the_second_next_call'),
    ("workers that all do the same", 'data.py', "n, skip = (worker.num_workers, worker.id) if worker else (1, 0)", "n, skip = 1, 0", 'test_promises.py::test_worker_processes_make_the_same_bytes_in_the_same_order'),
    ("a fork that waits for a thread", 'data.py', "if self.pid != os.getpid():", "if self.pid is None:", 'test_promises.py::test_a_loader_that_was_forked_goes_on'),
    ("validation on every rank", 'data.py', "            a, b = split(r1 - r0, rank, world)\n", "            a, b = 0, r1 - r0\n", 'test_promises.py::test_each_validation_query_counts_once_on_any_number_of_ranks'),
    ("a state that fits anything", 'data.py', "or state[key] != now[key])]", "or False)]", 'test_promises.py::test_a_place_in_another_stream_is_refused_by_exactly_the_name_of_what_differs'),
    ("a hash that knows no dihedral", 'sources.py', "        for d in range(8):\n            name[:]", "        for d in range(1):\n            name[:]", 'test_fuzz.py::test_the_hash_of_a_pair_sees_no_color_names_and_no_symmetry'),
    ("a leak guard by name", 'sources.py', "np.isin(corpus.input_hash, np.array(list(asked), np.uint64))", "np.isin(corpus.input_hash, [])", 'test_data.py::test_data_that_holds_a_query_of_adapt_is_refused_dropped_or_allowed'),
    ("a held out query in another task", 'data.py', "            held[p] |= any(", "            held[p] |= False and any(", 'test_data.py::test_an_augmented_copy_of_a_held_out_query_in_another_task_is_held_out_too'),
    ("a door that lets booleans in", 'sources.py', "set(map(type, cells)) == {int}", "set(map(type, cells)) <= {int, bool}", 'test_fuzz.py'),
    ("a door that does not look at colors", 'sources.py', " and min(cells) >= 0 and max(cells) <= 9:", " and min(cells) >= 0 and max(cells) <= 255:", 'test_fuzz.py'),
    ("a corpus is what it is called", 'sources.py', "if name not in ('colors', 'hash', 'input_hash')]", "if name not in ('colors', 'hash', 'input_hash', 'cells')]", 'test_fuzz.py'),
    ("a packed corpus that nobody hashes", 'sources.py', "            if found != manifest['sha256'].get(name):", "            if False:", 'test_fuzz.py::test_a_flipped_byte_a_short_file_and_a_missing_one_are_refused_by_name'),
    ("z counts pairs and not grids", 'data.py', "z = np.uint8(2 * k + side)", "z = np.uint8(2 * k)", 'test_promises.py::test_the_kernels_equal_plain_python_on_1000_random_configurations'),
    ("the loss of a packed row moves on to the next document", 'data.py', "                y[start : at - 1] = x[start + 1 : at]", "                y[start : at] = tokens[start + 1 : at + 1]",
     'test_promises.py::test_the_kernels_equal_plain_python_on_1000_random_configurations'),
    ("a color map with replacement", 'data.py', "code = (visit % total * (", "code = (visit % total // U(2) * (", 'test_data.py::test_color_maps_come_without_replacement_and_keep_what_is_fixed'),
    ("scores that are not scaled", 'model.py', "* qb.size(-1) ** -0.5", "* 1.0", 'test_model.py::test_attention_sees_what_it_should_on_every_path'),
    ("a window that is one wider", 'model.py', "(i - j).abs() < window)", "(i - j).abs() <= window)", 'test_model.py::test_attention_sees_what_it_should_on_every_path'),
    ("a window whose first key is lost", 'model.py', "max(lo, n + a + 1 - window)", "max(lo, n + a + 2 - window)", 'test_model.py::test_attention_sees_what_it_should_on_every_path'),
    ("a window that decoding forgets", 'model.py', "max(n + 1 - window, 0) if window > 0 else 0", "0", 'test_model.py::test_cached_decoding_equals_the_full_forward'),
    ("a prompt that sees half of itself", 'model.py', "hi = 0, n + (b if prompt is None else T)", "hi = 0, n + b", 'test_model.py::test_attention_sees_what_it_should_on_every_path'),
    ("documents that see each other", 'model.py', "ok & (doc[b, i] == doc[b, j])", "ok", 'test_model.py::test_attention_sees_what_it_should_on_every_path'),
    ("keys cut off too early", 'model.py', ".int().argmax(1).min())\n            if prompt", ".int().argmax(1).max())\n            if prompt", 'test_model.py::test_attention_sees_what_it_should_on_every_path'),
    ("flex attention with the blocks of the first row", 'model.py', "len(x) if doc is not None or prompt is not None else None", "None if doc is None else len(x)", 'test_model.py::test_the_blocks_that_flex_attention_skips_are_those_of_each_row'),
    ("key heads in another order", 'model.py', "kb.repeat_interleave(shared, 1)", "kb.repeat(1, shared, 1, 1)", 'test_model.py::test_shared_keys_and_values_are_those_of_full_heads_that_are_equal'),
    ("queries of any norm", 'model.py', "        if self.qk_norm:", "        if False:", 'test_model.py::test_queries_and_keys_have_norm_one_if_asked'),
    ("rope over the place in the row", 'model.py', "place = place - (place * first).cummax(1).values", "pass", 'test_model.py::test_a_packed_row_equals_its_documents_alone'),
    ("a state that is not quite forgotten", 'model.py', "FORGET = -30.0", "FORGET = -9.0", 'test_model.py::test_ssd_matches_the_recurrence'),
    ("a state that does not decay", 'model.py', "new[:, i] + state * keep[:, i]", "new[:, i] + state", 'test_model.py::test_ssd_matches_the_recurrence'),
    ("a scan that sees one token ahead", 'model.py', "triu(1)", "triu(2)", 'test_model.py::test_ssd_matches_the_recurrence'),
    ("a convolution over the border", 'model.py', "                earlier = earlier * ctx.same[k - 1]", "                pass", 'test_model.py::test_a_packed_row_equals_its_documents_alone'),
    ("a convolution that looks the other way", 'model.py', "mixed + earlier * w[k]", "mixed + earlier * w[-k]", 'test_model.py::test_mamba_equals_that_of_transformers_with_the_same_weights'),
    ("a norm before the gate", 'model.py', "self.norm((y * F.silu(gate)).type_as(x))", "self.norm(y.type_as(x)) * F.silu(gate)", 'test_model.py::test_mamba_equals_that_of_transformers_with_the_same_weights'),
    ("no skip", 'model.py', "(y + v * self.skip[:, None])", "(y + 0 * self.skip[:, None])", 'test_model.py::test_mamba_equals_that_of_transformers_with_the_same_weights'),
    ("a convolution that starts anew at each token", 'model.py', "cache.conv, cache.state = u[:, T:], state", "cache.conv, cache.state = 0 * u[:, T:], state", 'test_model.py::test_cached_decoding_equals_the_full_forward'),
    ("a second loop with the cache of the first", 'model.py', "cache.layers[i] if", "cache.layers[i % len(self.blocks)] if", 'test_model.py::test_cached_decoding_equals_the_full_forward_over_the_border_of_documents'),
    ("documents that stay when rows leave", 'model.py', "self.doc is None else self.doc[rows]", "self.doc is None else self.doc[: len(rows)]", 'test_model.py::test_cached_decoding_equals_the_full_forward_over_the_border_of_documents'),
    ("one loop for two", 'model.py', "range(self.cfg.loops * len(self.blocks))", "range(len(self.blocks))", 'test_model.py::test_the_stack_run_twice_is_a_stack_of_twice_the_layers'),
    ("decays that decay", 'model.py', "'plain' if p.ndim < 2", "'plain' if p.ndim < 1", 'test_model.py::test_each_parameter_has_one_optimizer_and_decays_as_it_should'),
    ("rates that no dial turns", 'model.py', "scale = (128 / self.filled().n_embd) ** 0.5", "scale = 1", 'test_model.py::test_the_dial_sets_width_heads_and_learning_rates'),
    ("a NaN from one optimizer to the other", 'train.py', "if not scaler.is_enabled() or torch.isfinite(norm):", "if True:", 'test_train.py::test_a_step_that_overflows_is_skipped_by_all_optimizers'),
    ("validation in rows of its own", 'data.py', "self.cfg.batching, U(0))", "'bucket', None)", 'test_train.py::test_validation_leaves_the_compiled_blocks_to_training'),
    ("optimizer state that is not saved", 'checkpoint.py', "                tensors[f\"optim.{names[id(p)]}.{key}\"] = x.detach().cpu().contiguous()", "                pass", KILLS),
    ("one checkpoint and no other", 'checkpoint.py', "KEEP = 2", "KEEP = 1", KILLS),
    ("temps that stay", 'checkpoint.py', "            if path.name[1:-4] in WRITTEN or", "            if False and", 'test_reliability.py::test_two_runs_cannot_write_one_directory'),
    ("rows that stay in the log", 'view.py', " if x['step'] < step or (x['step'] == step and 'loss' in x)]", "]", 'test_reliability.py::test_50_kills_at_any_moment_and_the_run_is_the_one_that_never_stopped'),
    ("no fsync", 'checkpoint.py', "            os.fsync(f.fileno())\n", "", 'test_reliability.py::test_power_loss_at_any_moment_leaves_the_old_checkpoint_or_the_new_one'),
    ("no fsync of the directory", 'checkpoint.py', "        os.fsync(fd)\n", "        pass\n", 'test_reliability.py::test_power_loss_at_any_moment_leaves_the_old_checkpoint_or_the_new_one'),
    ("a temp that stays after an error", 'checkpoint.py', "        temp.unlink(missing_ok=True)\n", "", 'test_reliability.py::test_a_full_disk_costs_nothing_but_the_save'),
    ("a hash that nobody looks at", 'checkpoint.py', "        if found != want:", "        if False:", 'test_reliability.py::test_no_damaged_checkpoint_is_ever_loaded'),
    ("damaged ones that count", 'checkpoint.py', "    keep = [step, *(x for x in steps(out_dir) if x < step)][:KEEP]", "    keep = steps(out_dir)[:KEEP]",
     'test_reliability.py::test_training_goes_on_from_the_one_before_a_damaged_checkpoint_and_keeps_two_good_ones'),
    ("arrays that are unpickled", 'sources.py', "np.load(file, mmap_mode='c', allow_pickle=False)", "np.load(file, allow_pickle=True)", 'test_reliability.py::test_nothing_in_a_file_is_ever_run'),
    ("a handler that only notes the second", 'train.py', "        if self.got and time.monotonic() > self.since + self.GRACE:", "        if False:", 'test_reliability.py::test_a_second_signal_does_not_wait'),
    ("a step that is not saved", 'train.py', "                if step > start or not cfg.resume:", "                if False:", 'test_reliability.py::test_a_signal_in_the_middle_of_something_waits_for_its_end'),
    ("no lock", 'checkpoint.py', "            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)", "            pass", 'test_reliability.py::test_two_runs_cannot_write_one_directory'),
    ("a model of another shape that passes", 'train.py', "    if any(getattr(saved.filled(), name)", "    if False and any(getattr(saved.filled(), name)", 'test_reliability.py::test_what_would_change_a_resumed_run_is_refused_by_exactly_its_name'),
    ("a dtype that changes", 'train.py', "('grad_accum', 'dtype', 'ns_steps')", "('grad_accum', 'ns_steps')", 'test_reliability.py::test_what_would_change_a_resumed_run_is_refused_by_exactly_its_name'),
    ("a bad step that is saved first", 'train.py', "(None if math.isfinite(loss) else (at, place))", "None", 'test_reliability.py::test_a_loss_that_is_not_finite_stops_with_the_tasks_and_keeps_the_last_good_checkpoint'),
    ("gradients averaged by rank", 'train.py', "scaler.scale(loss * world / n)", "scaler.scale(loss / n)", 'test_reliability.py::test_one_two_four_three_ranks_are_one_run'),
    ("a validation of one rank", 'train.py', "    total, tokens = over_ranks(world, 'SUM', total, tokens)\n", "", 'test_reliability.py::test_one_two_four_three_ranks_are_one_run'),
    ("a rank that stops alone", 'train.py', "over_ranks(world, 'MAX', signals.got, spoilt, max_iters))", "(signals.got, spoilt, max_iters))", 'test_reliability.py::test_one_two_four_three_ranks_are_one_run'),
    ("answers of the first rank alone", 'solve.py', "    if world > 1:\n", "    if False:\n", 'test_reliability.py::test_solve_gives_the_same_submission_on_any_number_of_ranks'),
    ("weights that are not averaged", 'train.py', "1 - min(cfg.ema,", "1 - 0 * min(cfg.ema,", 'test_train.py::test_averaged_weights_are_the_average_and_what_solve_and_validation_use'),
    ("task rows by number", 'train.py', "    known = [(n, meta['rows'][key]) for", "    known = [(n, n) for", 'test_train.py::test_init_from_takes_the_weights_alone_and_knows_tasks_by_their_content'),
    ("an earlier run forgotten", 'train.py', "(cfg.resume, cfg.init_from))", "())", 'test_train.py::test_what_an_earlier_run_was_trained_on_is_not_forgotten'),
    ("a search that goes on with nothing", 'solve.py', "        if len(rows) == 0: #", "        if len(rows) == 0 and ended.any(): #", 'test_solve.py::test_a_search_may_end_with_a_branch_that_became_too_improbable'),
    ("a search that forgets branches", 'solve.py', "            wanted = logp[:, None] + scores >= math.log(p_min)", "            wanted = scores >= math.log(p_min)\n            wanted &= wanted.cumsum(1) < 2", 'test_solve.py::test_the_search_finds_what_brute_force_finds'),
    ("a cache of other rows", 'solve.py', "            cache.keep(parent)\n", "            cache.keep(parent.flip(0))\n", 'test_solve.py::test_decoding_together_equals_one_by_one'),
    ("filler that a prompt sees", 'solve.py', "        if filler.any() or", "        if False and", 'test_solve.py::test_candidates_are_the_same_whatever_goes_together_and_if_memory_runs_out'),
    ("filler that a scan remembers", 'model.py', "doc is not None and not (here and doc.max() <= 0):", "False:", 'test_solve.py::test_filler_before_a_shorter_prompt_changes_nothing'),
    ("batches without memory that are left out", 'solve.py', "                    size = self.fits[f.__name__] = len(part) // 2\n", "                    rest, size = rest[size:], len(part) // 2\n", 'test_solve.py::test_candidates_are_the_same_whatever_goes_together_and_if_memory_runs_out'),
    ("a judge that sees the colors of another view", 'solve.py', "[dihedral(x.cmap[c.grid], x.dihedral) for c", "[dihedral(c.grid, x.dihedral) for c", 'test_solve.py::test_a_judge_asks_each_candidate_under_every_view_in_its_own_colors_and_orientation'),
    ("a judge of one view", 'solve.py', "zip(best[query], np.mean(found, 0))", "zip(best[query], found[0])", 'test_solve.py::test_a_judge_asks_each_candidate_under_every_view_in_its_own_colors_and_orientation'),
    ("colors undone in the wrong order", 'solve.py', "np.argsort(cmap).astype(np.uint8)[grid]", "cmap[grid]", 'test_solve.py::test_views_differ_begin_with_the_query_itself_and_can_be_undone'),
    ("test-time training of the model itself", 'solve.py', "    tuned = copy.deepcopy(model)\n", "    tuned = model\n", 'test_finetune.py::test_test_time_training_leaves_the_model_as_it_is'),
    ("attempts that close a gap", 'solve.py', "            best = ranked.get((k, i), [])", "            best = ranked.get((k, i), ranked.get((k, i + 1), []))", 'test_solve.py::test_attempts_differ_and_every_query_has_an_entry_in_order'),
    ("the rows of a vocabulary in another order", 'finetune.py', "part.weight.detach()[kept].clone()", "part.weight.detach()[kept.flip(0)].clone()", 'test_finetune.py::test_a_shrunk_vocabulary_has_the_same_logits_on_the_tokens_that_are_kept'),
    ("a document that nobody sees begin", 'finetune.py', "new[:, 1:] = doc[:, 1:] != doc[:, :-1]", "pass", 'test_finetune.py::test_a_packed_row_equals_its_documents_alone'),
    ("documents that a language model sees together", 'finetune.py', "place = place - torch.where(new, place, 0).cummax(1).values", "pass", 'test_finetune.py::test_a_packed_row_equals_its_documents_alone'),
    ("a scan that forgets", 'finetune.py', "steps = 1 if n > 0 and", "steps = 1 if False and", LM_CLASSES),
    ("places that transformers counts", 'finetune.py', "{'position_ids': place} if self.takes_places else {}", "{}", LM_CLASSES),
    ("adapters that nothing goes through", 'finetune.py', "('dt_proj', *(", "('none', *(", LM_CLASSES),
    ("filler that a language model sees", 'finetune.py', "            if cache.real is not None:\n", "            if False:\n", 'test_finetune.py::test_prompts_of_several_lengths_go_together'),
    ("places that filler counts in", 'finetune.py', "(cache.real.cumsum(1) - 1)[:, n:]", "place", 'test_finetune.py::test_prompts_of_several_lengths_go_together'),
    ("rows that end before the others", 'finetune.py', "right=cache is not None and n == 0)", "right=False)", 'test_finetune.py::test_prompts_of_several_lengths_go_together'),
    ("longer answers that begin with nothing", 'finetune.py', "right=cache is not None and n == 0)", "right=cache is not None)", 'test_finetune.py::test_answers_of_several_lengths_are_scored_as_alone'),
    ("mixers without adapters", 'finetune.py', "and 'adapter_list' not in name]", "and 'adapter_list' not in name and 'in_proj' not in name]", 'test_finetune.py::test_every_mixer_has_adapters_but_where_peft_forbids_it'),
    ("a loss of what is not asked", 'finetune.py', "F.pad(targets[:, :-1] != -100, (1, 0)).gather(1, of)", "F.pad(targets[:, :-1] != -100, (0, 1)).gather(1, of)", 'test_finetune.py::test_the_loss_is_that_of_all_tokens_of_the_symbols_that_carry_it'),
    ("a loss of tokens that do not exist", 'finetune.py', "            asked &= torch.arange", "            asked | torch.arange", 'test_finetune.py::test_the_loss_of_a_row_does_not_depend_on_who_shares_the_batch'),
    ("a base of 16 bits outside autocast", 'finetune.py', "        half = self.dtype != torch.float32 and", "        half = False and", 'test_finetune.py::test_frozen_weights_may_be_bf16'),
    ("layers that are in training while they decode", 'finetune.py', "m.training = torch.is_grad_enabled()", "m.training = True", 'test_finetune.py::test_recomputed_activations_give_the_same_gradients'),
    ("a judge of views that nobody decoded", 'solve.py', "asked = [x for x in self.seen if", "asked = [x for x in self.views if", 'test_solve.py::test_minutes_bound_the_views_and_every_query_gets_one'),
    ("a base that nobody hashes", 'finetune.py', "hash_base(cfg.base) != cfg.base_sha256:", "False:", 'test_finetune.py::test_the_wrong_base_is_refused_by_name_and_a_moved_one_is_not'),
    ("a copy that shares all", 'finetune.py', "*self.named_buffers()] if name not in self.trained}", "*self.named_buffers()]}", 'test_finetune.py::test_a_copy_shares_what_is_not_trained'),
    ("an export without its adapters", 'finetune.py', "            m.merge()\n", "            pass\n", 'test_finetune.py::test_an_export_is_a_model_of_transformers_that_gives_the_same_logits'),
    ("symbols that are encoded alone", 'finetune.py', "return b[len(a) :] if b[: len(a)] == a and len(b) > len(a) else self.tokens(text)", "return self.tokens(text)", 'test_finetune.py::test_what_the_model_is_given_are_the_tokenizers_own_tokens_of_1000_augmented_tasks'),
    ("text targets that are their own tokens", 'text.py', "targets[r, t] = x[t + 1]", "targets[r, t] = x[t]", 'test_text.py::test_shuffled_it_is_the_same_in_plain_python'),
    ("a last batch too many of a shard", 'text.py', "(self.sizes - 1 - a * T) // G", "(self.sizes - 1) // G", 'test_text.py::test_in_sequence_it_is_the_loader_of_build_nanogpt'),
    ("every epoch of text in the same order", 'text.py', "mix(mix(mix(U(0), seed), EPOCH), epoch)", "mix(mix(mix(U(0), seed), EPOCH), U(0))", 'test_text.py::test_an_epoch_has_each_window_once_and_no_two_seeds_or_epochs_are_alike'),
    ("one buffer of text", 'text.py', "buffers = self.ring[turn]\n", "buffers, turn = self.ring[0], 0\n", 'test_text.py::test_a_batch_is_valid_until_the_second_next_call'),
    ("a shard that nobody hashes", 'text.py', "            if found != x.get('sha256', found):", "            if False:", 'test_text.py::test_a_changed_shard_tokenizer_or_manifest_is_refused_by_its_name'),
    ("documents that a resumed preparation repeats", 'text.py', "state.update(documents=number, used=used,", "state.update(documents=number, used=0,", 'test_text.py::test_a_kill_before_and_after_each_file_of_prepare_loses_nothing'),
    ("a text that can write end-of-text", 'text.py', "    tok.encode_special_tokens = True\n", "", 'test_text.py::test_documents_come_back_from_the_shards_whatever_they_were_read_from'),
    ("acc_norm without the norm", 'text.py', "(total / count).argmin()", "total.argmin()", 'test_text.py::test_acc_is_by_the_sum_and_acc_norm_by_the_mean_of_the_losses'),
    ("endings that are not counted from their first token", 'text.py', ">= n[:, None], 0).sum(1)", ">= 99, 0).sum(1)", 'test_text.py::test_a_context_that_is_read_once_gives_the_losses_of_the_whole'),
    ("a cache that some models do not have", 'text.py', " and all(type(x) in plain for x in cache.layers)", "", 'test_text.py::test_models_of_transformers_are_asked_the_same_with_their_cache_or_without'),
    ("items that each rank counts", 'text.py', "items[rank::world]", "items", 'test_text.py::test_two_ranks_count_each_item_once'),
    ("empty rows that are one large document", 'train.py', "device=batch.doc.device) // 128", "device=batch.doc.device) * 0", 'test_train.py::test_batches_are_filled_up_for_a_compiler'),
    ("another tokenizer's embedding", 'train.py', "and meta['stream']['tokenizer_sha256'] != ds.tokenizer_sha256:", "and meta['model']['vocab_size'] != model.cfg.vocab_size:", 'test_text.py::test_other_text_begins_with_all_of_it_if_the_tokens_are_the_same'),
    ("a tokenizer that stays behind", 'train.py', "{'trained_on.txt': lines.encode(), **ds.files}", "{'trained_on.txt': lines.encode()}", 'test_text.py::test_a_run_that_moved_has_its_tokenizer'),
    ("a nucleus without its last token", 'solve.py', "p.masked_fill(p.cumsum(-1) - p >= top_p, 0)", "p.masked_fill(p.cumsum(-1) >= top_p, 0)", 'test_text.py::test_drawn_tokens_have_the_probabilities_of_what_is_left'),
    ("a validation that goes on too far", 'text.py', "len(self.shards[self.val[0]]) - 1)", "len(self.shards[self.val[0]]))", 'test_text.py::test_validation_is_the_beginning_of_the_validation_shard_each_row_once'),
    ("trials that take all threads", 'sweep.py', "// cfg.jobs, 1)", ", 1)", 'test_sweep.py::test_a_trial_has_its_share_of_the_threads'),
    ("a sweep without the default", 'sweep.py', "if first := first_trial(search, base):", "if first := {}:", 'test_sweep.py::test_a_trial_has_its_share_of_the_threads'),
    ("a pruner that nobody hears", 'sweep.py', "prune = prune or (tenth", "prune = False and (tenth", 'test_sweep.py::test_a_trial_worse_than_the_others_is_stopped'),
    ("a failed trial that ends all", 'sweep.py', "catch=Failed, ", "", 'test_sweep.py::test_a_trial_that_fails_fails_alone_and_train_takes_the_best'),
    ("a search over what is measured", 'sweep.py', "if name in fixed or name in MEASURE:", "if name in fixed:", 'test_sweep.py::test_a_bad_space_is_refused_by_file_and_key'),
    ("warm-up that knows no share", 'train.py', "cfg.warmup_frac * max_iters or ", "", 'test_sweep.py::test_warm_up_as_a_share_of_the_steps'),
]

def main(words):
    unseen, env = [], {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONDONTWRITEBYTECODE': '1'}
    controls = [c for c in CONTROLS if all(word in c[0] + c[1] + c[4] for word in words)]
    tests = sorted({f"tests/{test}" for *_, test in controls})
    if subprocess.run([sys.executable, '-m', 'pytest', '-q', *tests], cwd=ROOT, env=env).returncode:
        sys.exit("these tests are to be green first")
    with tempfile.TemporaryDirectory() as temp:
        for folder in ('nanoarc', 'tests'):
            shutil.copytree(ROOT / folder, Path(temp) / folder)
        shutil.copy(ROOT / 'pyproject.toml', temp)
        for name, file, line, bug, test in controls:
            path = Path(temp) / 'nanoarc' / file
            text = path.read_text()
            assert text.count(line) == 1, f"{name}: {file} has this line {text.count(line)} times: {line}"
            path.write_text(text.replace(line, bug))
            try:
                command = [sys.executable, '-m', 'pytest', '-q', '-x', '-p', 'no:cacheprovider', f"tests/{test}"]
                code = subprocess.run(command, cwd=temp, env={**env, 'PYTHONPATH': temp}, capture_output=True, timeout=120).returncode
            except subprocess.TimeoutExpired: # a test that hangs is red too
                code = 1
            path.write_text(text)
            print(f"{'red, as it must be' if code == 1 else 'NOT SEEN' if code == 0 else f'pytest failed, exit code {code}'}: {name}", flush=True)
            unseen += [name] * (code != 1)
    print(f"{len(controls) - len(unseen)} of {len(controls)} planted bugs were seen")
    sys.exit(bool(unseen))

if __name__ == '__main__':
    main(sys.argv[1:])
