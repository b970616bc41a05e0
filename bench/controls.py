"""
can the tests of what is promised fail (tests/README.md)? each control plants one bug in a copy of the sources and runs
the test that must turn red. usage: python bench/controls.py [words of a name, file or test], 35 minutes on 2 cpu cores.
exit code 1 if a bug went unseen.
"""
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent

class Control(NamedTuple):
    name: str
    file: str # of the package
    line: str # stands in it once
    bug: str # what that becomes
    test: str # file or file::test that is to turn red

CONTROLS = [
    Control(
        "an epoch without the walk", 'data.py',
        "        if i < n: #",
        "        if True: #",
        "test_promises.py::test_an_epoch_is_a_permutation_at_any_size"),
    Control(
        "an epoch begins one late", 'data.py',
        "np.divmod(t, n)",
        "np.divmod(t + U(1), n)",
        "test_promises.py::test_every_target_comes_once_an_epoch_times_its_repeat"),
    Control(
        "seed + epoch", 'data.py',
        "hash64(self.seed, EPOCH, epoch)",
        "hash64(self.seed + epoch, EPOCH)",
        "test_promises.py::test_no_two_seeds_or_epochs_share_a_stream"),
    Control(
        "another number of rounds", 'data.py',
        "for k in range(4):\n            left",
        "for k in range(6):\n            left",
        "test_promises.py::test_the_order_is_the_one_that_it_always_was"),
    Control(
        "resuming by fast-forward", 'data.py',
        "        self.window, self.batch = state['window']",
        "        [self.rows(w) for w in range(min(state['window'], 9))]\n"
        "        self.window, self.batch = state['window']",
        "test_promises.py::test_resuming_costs_one_plan_wherever_it_is"),
    Control(
        "augments from a global generator", 'data.py',
        "self.slot[i].astype(U) #",
        "self.slot[i].astype(U) + U(np.random.randint(8)) #",
        "test_promises.py::test_every_place_can_be_gone_back_to"),
    Control(
        "batches that are not part of the state", 'data.py',
        "'batch': self.batch, 'seed'",
        "'batch': 0, 'seed'",
        "test_promises.py::test_every_place_can_be_gone_back_to"),
    Control(
        "ranks that cut off the rest", 'data.py',
        "        a, b = split(r1 - r0, self.rank, self.world)\n",
        "        a, b = [(r1 - r0) // self.world * r for r in (self.rank, self.rank + 1)]\n",
        "test_promises.py::test_one_two_four_three_ranks_see_the_same_global_stream"),
    Control(
        "ranks that draw for themselves", 'data.py',
        "        rows = self.rows(window)\n        r0",
        "        rows = self.rows(window + self.rank)\n        r0",
        "test_promises.py::test_any_number_of_ranks_sees_the_same_global_stream"),
    Control(
        "batches that are kept", 'data.py',
        "        self.turn = (turn + 1) % 3\n",
        '        self.turn = (turn + 1) % 3\n'
        "        self.__dict__.setdefault('kept', []).append(batch.idx.clone())\n",
        "test_promises.py::test_memory_stays_flat_over_100_000_batches"),
    Control(
        "a ring of two", 'data.py',
        "self.turn = (turn + 1) % 3",
        "self.turn = (turn + 1) % 2",
        "test_promises.py::test_a_batch_is_valid_until_the_second_next_call"),
    Control(
        "workers that all do the same", 'workers.py',
        "worker, n = (info.id, info.num_workers) if info else (0, 1)",
        "worker, n = 0, 1",
        "test_promises.py::test_worker_processes_make_the_same_bytes_in_the_same_order"),
    Control(
        "a fork that waits for a thread", 'data.py',
        "if self.pid != os.getpid():",
        "if self.pid is None:",
        "test_promises.py::test_a_loader_that_was_forked_goes_on"),
    Control(
        "validation on every rank", 'data.py',
        "            a, b = split(r1 - r0, rank, world)\n",
        "            a, b = 0, r1 - r0\n",
        "test_promises.py::test_each_validation_query_counts_once_on_any_number_of_ranks"),
    Control(
        "a state that fits anything", 'data.py',
        "wrong = differences({**saved, **place}, {**now, **place})",
        "wrong = []",
        "test_promises.py::test_a_place_in_another_stream_is_refused_by_exactly_the_name_of_what_differs"),
    Control(
        "a setting that is newer than a saved state", 'data.py',
        "state.get(name, default.get(name))",
        "state.get(name)",
        "test_run.py::test_a_setting_that_is_newer_than_a_run_has_its_default_and_the_run_goes_on"),
    Control(
        "a hash that knows no dihedral", 'corpus.py',
        "        inputs[p] = hashes[:, 0].min()\n        pairs[p] = hashes[:, 1].min()\n",
        "        inputs[p] = hashes[0, 0]\n        pairs[p] = hashes[0, 1]\n",
        "test_corpus.py::test_the_hash_of_a_pair_sees_no_color_names_and_no_symmetry"),
    Control(
        "a leak guard by name", 'corpus.py',
        "same_input = np.isin(c.input_hash, np.array(list(asked), np.uint64))",
        "same_input = np.isin(c.input_hash, [])",
        "test_data.py::test_data_that_holds_a_query_of_adapt_is_refused_dropped_or_allowed"),
    Control(
        "a held out query in another task", 'data.py',
        "held = np.isin(s.hash, s.hash[val]) & s.known",
        "held = val.copy()",
        "test_data.py::test_an_augmented_copy_of_a_held_out_query_in_another_task_is_held_out_too"),
    Control(
        "a door that lets booleans in", 'grids.py',
        "set(map(type, row)) != {int} or",
        "not set(map(type, row)) <= {int, bool} or",
        "test_fuzz.py"),
    Control(
        "a door that does not look at colors", 'grids.py',
        " or min(row) < 0 or max(row) > 9:",
        " or min(row) < 0 or max(row) > 255:",
        "test_fuzz.py"),
    Control(
        "a typo of a known key let through", 'grids.py',
        "    refuse_typos(obj, needed + allowed, where)\n",
        "",
        "test_sources.py::test_a_typo_of_a_known_key_is_refused_by_name_in_each_format"),
    Control(
        "names of two lines", 'grids.py',
        " or not name.isprintable():",
        ":",
        "test_sources.py::test_no_name_breaks_a_line_whatever_file_it_comes_from"),
    Control(
        "links that lead anywhere", 'sources.py',
        "if os.path.islink(path) and not leads_into(root, path):",
        "if False:",
        "test_sources.py::test_no_link_is_left_out_in_silence"),
    Control(
        "data left out by its name", 'sources.py',
        "{*READERS, *ARCHIVES, *UNREAD}",
        "{*READERS}",
        "test_sources.py::test_what_looks_like_data_and_is_not_read_is_named"),
    Control(
        "a bundled source that hides a folder", 'sources.py',
        "    if is_bundled(source) and not means_path(source, [source]):",
        "    if is_bundled(source):",
        "test_sources.py::test_a_name_that_could_be_two_sources_is_refused"),
    Control(
        "a leak guard that sees a task's first query only", 'corpus.py',
        "enumerate(range(end_of_demos, c.first[k + 1])):",
        "enumerate(range(end_of_demos, end_of_demos + 1)):",
        "test_corpus.py::test_the_leak_guard_asks_for_every_query_of_a_task"),
    Control(
        "--drop_overlap leaves out one of two tasks", 'corpus.py',
        "bad[[p for p, _ in found]] = True",
        "bad[[p for p, _ in found][:1]] = True",
        "test_data.py::test_data_that_holds_a_query_of_adapt_is_refused_dropped_or_allowed"),
    Control(
        "a corpus hash that is blind to which pairs are demos", 'corpus.py',
        "        follow = 'colors', 'hash', 'input_hash' #",
        "        follow = 'colors', 'hash', 'input_hash', 'n_demos' #",
        "test_corpus.py::test_a_name_a_shape_a_split_and_an_order_change_the_corpus_and_a_place_does_not"),
    Control(
        "a packed corpus with an empty demo", 'corpus.py',
        "    is_grid = (sizes > 0) | (may_be_empty & (h == w))",
        "    is_grid = (sizes > 0) | (h == w)",
        "test_corpus.py::test_only_the_answer_of_a_query_may_be_empty"),
    Control(
        "hashes that a packed corpus makes up", 'corpus.py',
        "        if not c.is_indexed():",
        "        if False:",
        "test_corpus.py::test_what_follows_from_the_cells_cannot_be_made_up"),
    Control(
        "one symmetry for a whole batch", 'data.py',
        "mix(mix(h_dihedral, pair), visit // U(8))",
        "mix(h_dihedral, visit // U(8))",
        "test_data.py::test_each_document_of_a_batch_is_turned_for_itself"),
    Control(
        "a corpus is what it is called", 'corpus.py',
        "        follow = 'colors', 'hash', 'input_hash' #",
        "        follow = 'colors', 'hash', 'input_hash', 'cells' #",
        "test_corpus.py::test_one_changed_digit_in_any_of_500_tasks_changes_the_corpus"),
    Control(
        "a packed corpus that nobody hashes", 'corpus.py',
        "    if found != sha256:",
        "    if False:",
        "test_corpus.py::test_a_flipped_byte_a_short_file_and_a_missing_one_are_refused_by_name"),
    Control(
        "z counts pairs and not grids", 'data.py',
        "docs.cmap[i], 2 * k + 1, idx, pos, at)",
        "docs.cmap[i], 2 * k, idx, pos, at)",
        "test_promises.py::test_the_kernels_equal_plain_python_on_1000_random_configurations"),
    Control(
        "the loss of a packed row moves on to the next document", 'data.py',
        "    if loss_on == 'all':\n        targets[start : at - 1] = idx[start + 1 : at]",
        "    if loss_on == 'all':\n        targets[start : at - 1] = idx[start : at - 1]",
        "test_promises.py::test_the_kernels_equal_plain_python_on_1000_random_configurations"),
    Control(
        "extra pairs that decide on color domains", 'data.py',
        "np.where(self.is_shown, sets[1::2], 0)",
        "np.where(self.is_demo, sets[1::2], 0)",
        "test_extra.py::test_what_a_query_is_asked_with_does_not_depend_on_extra_pairs"),
    Control(
        "extra pairs before a query that is validated on", 'data.py',
        "among = tab.n_shown[task] if as_is[i] else tab.n_demos[task]",
        "among = tab.n_demos[task]",
        "test_extra.py::test_what_a_query_is_asked_with_does_not_depend_on_extra_pairs"),
    Control(
        "extra pairs with replacement", 'data.py',
        "k[some] = bijection(k[some], size[some], key)",
        "k[some] = hash64(drawn[some], key) % size[some]",
        "test_extra.py::test_extra_pairs_come_without_replacement_however_few_an_epoch"),
    Control(
        "a context of a hundred", 'data.py',
        "            limit = min(most, tab.n_shown[task])",
        "            limit = most",
        "test_extra.py::test_a_context_is_of_own_and_extra_demos_and_no_longer_than_a_prompt"),
    Control(
        "extra pairs of adapt that nobody guards", 'corpus.py',
        "if i < len(data) else c.is_extra()",
        "if i < len(data) else np.zeros(len(c.hash), bool)",
        "test_extra.py::test_an_extra_pair_that_is_a_query_of_adapt_is_refused_dropped_or_allowed"),
    Control(
        "extra pairs that nobody writes down", 'data.py',
        "& (in_data | s.is_extra)",
        "& in_data",
        "test_extra.py::test_extra_pairs_that_were_trained_on_are_written_down_and_not_asked"),
    Control(
        "one large pair that takes its task", 'corpus.py',
        "~np.isin(task, task[bad & ~self.is_generated()])",
        "~np.isin(task, task[bad])",
        "test_extra.py::test_a_large_pair_goes_alone_and_a_large_published_demo_takes_its_task"),
    Control(
        "a color map with replacement", 'data.py',
        "bijection(visit % total, total,",
        "bijection(visit % total // U(2), total,",
        "test_data.py::test_color_maps_come_without_replacement_and_keep_what_is_fixed"),
    Control(
        "frames of a tile that lies on its side", 'model.py',
        "            asks = row % h, col % w",
        "            asks = row % w, col % h",
        "test_model.py::test_a_frame_finds_the_cell_of_the_turned_tiled_scaled_or_halved_input"),
    Control(
        "a second half that begins at the border between the two", 'model.py',
        "        i, j = i - (H - h), j - (W - w)",
        "        i, j = i - H // 2 * (h < H), j - W // 2 * (w < W)",
        "test_model.py::test_a_frame_finds_the_cell_of_the_turned_tiled_scaled_or_halved_input"),
    Control(
        "heads that only turn, without a gate", 'model.py',
        "frame != Frame('')",
        "frame.kind != ''",
        "test_model.py::test_a_head_that_only_turns_has_a_frame_too"),
    Control(
        "heads that begin open", 'model.py',
        "(self.gate(x) - CLOSED).sigmoid()",
        "(self.gate(x) + CLOSED).sigmoid()",
        "test_model.py::test_a_head_with_a_frame_begins_by_looking_at_its_cell_and_is_closed"),
    Control(
        "heads that look at the output for what the input has", 'model.py',
        "turn[-len(z) :] = -z",
        "turn[-len(z) :] = z",
        "test_model.py::test_a_head_with_a_frame_begins_by_looking_at_its_cell_and_is_closed"),
    Control(
        "an input whose size is that of another document", 'model.py',
        "        pair = pair + 256 * doc.int()",
        "        pair = pair + 0 * doc.int()",
        "test_model.py::test_a_packed_row_equals_its_documents_alone"),
    Control(
        "a cache that forgets the size of the input", 'model.py',
        "            return [x.expand(pos.shape[:2]) for x in self.size]",
        "            return input_sizes(pos, doc)",
        "test_model.py::test_cached_decoding_equals_the_full_forward"),
    Control(
        "tiles that are not counted across", 'model.py',
        "(col // W).clamp(max=3)",
        "(row // W).clamp(max=3)",
        "test_model.py::test_a_tile_has_a_number"),
    Control(
        "scores that are not scaled", 'model.py',
        "(q * q.size(-1) ** -0.5)",
        "(q * 1.0)",
        "test_model.py::test_attention_sees_what_it_should_on_every_path"),
    Control(
        "a window that is one wider", 'model.py',
        "last + 1 - window)",
        "last - window)",
        "test_model.py::test_attention_sees_what_it_should_on_every_path"),
    Control(
        "a window whose first key is lost", 'model.py',
        "past + begin + 1 - window",
        "past + begin + 2 - window",
        "test_model.py::test_attention_sees_what_it_should_on_every_path"),
    Control(
        "a window that decoding forgets", 'model.py',
        "    if window > 0:\n        first =",
        "    if window > 0 and T > 1:\n        first =",
        "test_model.py::test_cached_decoding_equals_the_full_forward"),
    Control(
        "documents that see each other", 'model.py',
        "first = last - place_in_document(doc,",
        "first = last - place_in_document(None,",
        "test_model.py::test_attention_sees_what_it_should_on_every_path"),
    Control(
        "keys cut off too early", 'model.py',
        "begin].min())",
        "begin].max())",
        "test_model.py::test_attention_sees_what_it_should_on_every_path"),
    Control(
        "flex attention without its first blocks", 'model.py',
        "low = first[:, None, ::BLOCK] // BLOCK",
        "low = first[:, None, 1::BLOCK] // BLOCK",
        "test_model.py::test_flex_attention_skips_the_blocks_that_nobody_sees_and_asks_nothing_where_all_do"),
    Control(
        "blocks of which one sees all", 'model.py',
        "[..., BLOCK - 1 :: BLOCK]",
        "[..., ::BLOCK]",
        "test_model.py::test_flex_attention_skips_the_blocks_that_nobody_sees_and_asks_nothing_where_all_do"),
    Control(
        "rope over the place in the row", 'model.py',
        "place = place - (place * is_first).cummax(1).values",
        "pass",
        "test_model.py::test_a_packed_row_equals_its_documents_alone"),
    Control(
        "a state that is not quite forgotten", 'model.py',
        "FORGET = -30.0",
        "FORGET = -9.0",
        "test_model.py::test_ssd_matches_the_recurrence"),
    Control(
        "a chunk that sees what comes after it", 'model.py',
        ".tril().exp().tril()",
        ".tril().exp()",
        "test_model.py::test_states_handed_on_at_once_are_those_of_a_chain"),
    Control(
        "a state that does not decay", 'model.py',
        "(until[..., :, None] - until[..., None, :]).tril().exp().tril()",
        "torch.ones_like(until[..., None] - until[..., None, :]).tril()",
        "test_model.py::test_ssd_matches_the_recurrence"),
    Control(
        "a scan that sees one token ahead", 'model.py',
        "triu(1)",
        "triu(2)",
        "test_model.py::test_ssd_matches_the_recurrence"),
    Control(
        "a convolution over the border", 'model.py',
        "                earlier = earlier * same[k]",
        "                pass",
        "test_model.py::test_a_packed_row_equals_its_documents_alone"),
    Control(
        "a convolution that looks the other way", 'model.py',
        "y + earlier * w[k]",
        "y + earlier * w[-k]",
        "test_model.py::test_mamba_equals_that_of_transformers_with_the_same_weights"),
    Control(
        "a norm before the gate", 'model.py',
        "self.norm(y * F.silu(gate))",
        "self.norm(y) * F.silu(gate)",
        "test_model.py::test_mamba_equals_that_of_transformers_with_the_same_weights"),
    Control(
        "no skip", 'model.py',
        "(y + v * self.skip[:, None])",
        "(y + 0 * self.skip[:, None])",
        "test_model.py::test_mamba_equals_that_of_transformers_with_the_same_weights"),
    Control(
        "a convolution that starts anew at each token", 'model.py',
        "cache.inputs, cache.state = u[:, T:], state",
        "cache.inputs, cache.state = 0 * u[:, T:], state",
        "test_model.py::test_cached_decoding_equals_the_full_forward"),
    Control(
        "a second loop with the cache of the first", 'model.py',
        "else cache.layers[i])",
        "else cache.layers[i % len(self.blocks)])",
        "test_model.py::test_cached_decoding_equals_the_full_forward_over_the_border_of_documents"),
    Control(
        "documents that stay when rows leave", 'model.py',
        "            self.doc = self.doc[rows]",
        "            self.doc = self.doc[: len(rows)]",
        "test_model.py::test_cached_decoding_equals_the_full_forward_over_the_border_of_documents"),
    Control(
        "one loop for two", 'model.py',
        "range(self.cfg.loops * len(self.blocks))",
        "range(len(self.blocks))",
        "test_model.py::test_the_stack_run_twice_is_a_stack_of_twice_the_layers"),
    Control(
        "decays that decay", 'model.py',
        "            if p.ndim < 2:",
        "            if p.ndim < 1:",
        "test_model.py::test_each_parameter_has_one_optimizer_and_decays_as_it_should"),
    Control(
        "rates that no dial turns", 'model.py',
        "    return 5e-3 * (128 / n_embd) ** 0.5",
        "    return 5e-3",
        "test_model.py::test_the_dial_sets_width_heads_and_learning_rates"),
    Control(
        "a NaN from one optimizer to the other", 'train.py',
        "if not scaler.is_enabled() or torch.isfinite(norm):",
        "if True:",
        "test_train.py::test_a_step_that_overflows_is_skipped_by_all_optimizers"),
    Control(
        "validation in rows of its own", 'data.py',
        "self.sampler.lay_out(docs, self.cfg.batching, U(0))",
        "self.sampler.lay_out(docs, 'bucket', U(0))",
        "test_train.py::test_validation_leaves_the_compiled_blocks_to_training"),
    Control(
        "a dropout whose random bytes are not even", 'model.py',
        ".random_(-2**63, None)",
        ".random_()",
        "test_model.py::test_dropout_leaves_out_its_share_and_scales_the_rest"),
    Control(
        "gradients in 16 bits before they are normed", 'model.py',
        "    x = g / (g.norm(dim=(1, 2), keepdim=True) + 1e-7) #",
        "    g = g.half()\n    x = g / (g.norm(dim=(1, 2), keepdim=True) + 1e-7) #",
        "test_model.py::test_muon_sees_small_gradients_in_16_bits_too"),
    Control(
        "a leak guard that believes half a list", 'corpus.py',
        "    if last.decode('ascii', 'replace') !=",
        "    if False and last !=",
        "test_solve.py::test_what_a_run_was_trained_on_is_not_half_known"),
    Control(
        "answers to other tasks are overwritten", 'solve.py',
        "    keep_answers(out_dir, tasks)\n",
        "",
        "test_solve.py::test_answers_to_other_tasks_are_not_overwritten"),
    Control(
        "candidates go by the name of a task alone", 'submission.py',
        "        if x.get('input', mine) != mine:",
        "        if False:",
        "test_submission.py::test_candidates_of_another_task_with_that_name_are_refused"),
    Control(
        "averages that are compiled too", 'train.py',
        "for block in self.model.blocks:",
        "for block in (*self.model.blocks, *(self.ema.blocks if self.ema else ())):",
        "test_train.py::test_averages_are_not_compiled"),
    Control(
        "a dropout that draws what it drew before", 'train.py',
        "int(hash64(cfg.seed, state.step, run.rank))",
        "cfg.seed",
        "test_reliability.py::test_dropout_draws_other_masks_on_each_rank_and_the_same_ones_in_a_resumed_run"),
    Control(
        "a validation in training mode", 'train.py',
        "    model.eval()\n",
        "",
        "test_train.py::test_dropout_is_on_in_steps_alone"),
    Control(
        "optimizer state that is not saved", 'checkpoint.py',
        '                tensors[f"optim.{name}.{key}"] = x\n',
        "                pass\n",
        "test_reliability.py::test_a_kill_before_and_after_each_filesystem_call_of_a_save_loses_nothing"),
    Control(
        "one checkpoint and no other", 'checkpoint.py',
        "KEEP = 2",
        "KEEP = 1",
        "test_reliability.py::test_a_kill_before_and_after_each_filesystem_call_of_a_save_loses_nothing"),
    Control(
        "temps that stay", 'checkpoint.py',
        "is_ours = path.name[1:-4] in WRITTEN or",
        "is_ours = False and",
        "test_reliability.py::test_two_runs_cannot_write_one_directory"),
    Control(
        "rows that stay in the log", 'run.py',
        "            if row['step'] < step or (row['step'] == step and 'loss' in row):",
        "            if True:",
        "test_reliability.py::test_50_kills_at_any_moment_and_the_run_is_the_one_that_never_stopped"),
    Control(
        "no fsync", 'checkpoint.py',
        "            os.fsync(f.fileno())\n",
        "",
        "test_reliability.py::test_power_loss_at_any_moment_leaves_the_old_checkpoint_or_the_new_one"),
    Control(
        "no fsync of the directory", 'checkpoint.py',
        "        os.fsync(fd)\n",
        "        pass\n",
        "test_reliability.py::test_power_loss_at_any_moment_leaves_the_old_checkpoint_or_the_new_one"),
    Control(
        "a temp that stays after an error", 'checkpoint.py',
        "        temp.unlink(missing_ok=True)\n",
        "",
        "test_reliability.py::test_a_full_disk_costs_nothing_but_the_save"),
    Control(
        "a hash that nobody looks at", 'checkpoint.py',
        "        if found == want:",
        "        if True:",
        "test_reliability.py::test_no_damaged_checkpoint_is_ever_loaded"),
    Control(
        "damaged ones that count", 'checkpoint.py',
        "    prune(out_dir, [step, *older][:KEEP])",
        "    prune(out_dir, steps(out_dir)[:KEEP])",
        "test_reliability.py::test_training_goes_on_from_the_one_before_a_damaged_checkpoint_and_keeps_two_good_ones"),
    Control(
        "arrays that are unpickled", 'corpus.py',
        "np.lib.format.open_memmap(file, mode='c')",
        "np.load(file, allow_pickle=True)",
        "test_reliability.py::test_nothing_in_a_file_is_ever_run"),
    Control(
        "a handler that only notes the second", 'run.py',
        "        elif time.monotonic() > self.since + self.GRACE:",
        "        elif False:",
        "test_reliability.py::test_a_second_signal_does_not_wait"),
    Control(
        "a step that is not saved", 'train.py',
        "        if state.step > start or not cfg.resume:",
        "        if False:",
        "test_reliability.py::test_a_signal_in_the_middle_of_something_waits_for_its_end"),
    Control(
        "no lock", 'checkpoint.py',
        "            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "            pass",
        "test_reliability.py::test_two_runs_cannot_write_one_directory"),
    Control(
        "a model of another shape that passes", 'run.py',
        "    elif old.resolved() == new.resolved(): #",
        "    elif True: #",
        "test_reliability.py::test_what_would_change_a_resumed_run_is_refused_by_exactly_its_name"),
    Control(
        "a dtype that changes", 'run.py',
        "('grad_accum', 'dtype', 'ns_steps')",
        "('grad_accum', 'ns_steps')",
        "test_reliability.py::test_what_would_change_a_resumed_run_is_refused_by_exactly_its_name"),
    Control(
        "a bad step that is saved first", 'run.py',
        "            if self.bad is None and not math.isfinite(x): #",
        "            if False: #",
        "test_reliability.py::test_a_loss_that_is_not_finite_stops_with_the_tasks_and_keeps_the_last_good_checkpoint"),
    Control(
        "a gradient that is not finite beside a finite loss", 'train.py',
        "total if scaler.is_enabled() else total + norm.detach())",
        "total)",
        "test_reliability.py::test_a_loss_that_is_not_finite_stops_with_the_tasks_and_keeps_the_last_good_checkpoint"),
    Control(
        "the tasks of a bad step from its first micro batch only", 'train.py',
        "self.loader.names(*place, self.cfg.grad_accum)",
        "self.loader.names(*place)",
        "test_reliability.py::test_a_loss_that_is_not_finite_stops_with_the_tasks_and_keeps_the_last_good_checkpoint"),
    Control(
        "weights that are not finite but saved", 'checkpoint.py',
        "    if bad:\n",
        "    if False:\n",
        "test_reliability.py::test_an_update_that_is_not_finite_is_not_saved"),
    Control(
        "a setting that may be no number", 'settings.py',
        "not low <= number <= high",
        "(number < low or number > high)",
        "test_settings.py::test_no_setting_is_infinite_or_no_number"),
    Control(
        "optimizer state of another shape", 'checkpoint.py',
        '    refuse_others(have, want, "optimizer states")\n',
        "",
        "test_checkpoint.py::test_optimizer_state_that_does_not_fit_is_refused_by_name"),
    Control(
        "a run through a link", 'checkpoint.py',
        "    refuse_links(out_dir)\n    with",
        "    with",
        "test_checkpoint.py::test_a_link_in_a_run_is_refused_by_name"),
    Control(
        "a user's file that is pruned", 'checkpoint.py',
        " and path == file(out_dir, int(number), kind) and",
        " and",
        "test_checkpoint.py::test_what_a_user_puts_beside_the_checkpoints_stays_and_is_in_nobodys_way"),
    Control(
        "a directory that a sweep's database names", 'sweep.py',
        "        if not re.fullmatch(",
        "        if False and re.fullmatch(",
        "test_sweep.py::test_a_run_that_the_database_names_elsewhere_is_refused"),
    Control(
        "ranks of two runs", 'train.py',
        "        together(self.world, self.read)\n",
        "        self.read()\n",
        "test_reliability.py::test_ranks_of_two_runs_are_refused_on_all_ranks_by_what_differs"),
    Control(
        "a tracker that ends a run", 'run.py',
        "            if what not in self.failed:",
        "            raise e\n            if what not in self.failed:",
        "test_run.py::test_a_tracker_that_fails_ends_no_run_and_is_said_once"),
    Control(
        "a leak that no checkpoint knows", 'train.py',
        "'leaks': self.ds.leaks,",
        "'leaks': [],",
        "test_solve.py::test_a_leak_that_training_was_allowed_is_in_its_checkpoint_and_in_the_score"),
    Control(
        "gradients averaged by rank", 'train.py',
        "scaler.scale(loss * world / n)",
        "scaler.scale(loss / n)",
        "test_reliability.py::test_one_two_four_three_ranks_are_one_run"),
    Control(
        "a validation of one rank", 'train.py',
        "    total, tokens = over_ranks(world, 'SUM', total, tokens)\n",
        "",
        "test_reliability.py::test_one_two_four_three_ranks_are_one_run"),
    Control(
        "a rank that stops alone", 'train.py',
        "over_ranks(world, 'MAX', signals.got, state.max_iters, run.watch.found())",
        "(signals.got, state.max_iters, run.watch.found())",
        "test_reliability.py::test_one_two_four_three_ranks_are_one_run"),
    Control(
        "answers of the first rank alone", 'submission.py',
        "        if self.world > 1:\n",
        "        if False:\n",
        "test_reliability.py::test_solve_gives_the_same_submission_on_any_number_of_ranks"),
    Control(
        "losses that are not saved", 'train.py',
        "state.tokens, *state.losses)",
        "state.tokens)",
        "test_train.py::test_a_resumed_run_is_the_run_that_never_stopped"),
    Control(
        "losses of all steps in each row", 'run.py',
        "        self.total, self.n, self.tokens, self.time, self.waited = 0.0, 0, tokens, now, waited\n",
        "",
        "test_train.py::test_a_row_holds_the_mean_loss_of_the_steps_since_the_row_before"),
    Control(
        "weights that are not averaged", 'train.py',
        "a.lerp_(p.detach(), 1 - decay)",
        "a.lerp_(p.detach(), 1)",
        "test_train.py::test_averaged_weights_are_the_average_and_what_solve_and_validation_use"),
    Control(
        "task rows by number", 'run.py',
        "theirs[meta['rows'][key]]",
        "theirs[ds.rows[key]]",
        "test_run.py::test_init_from_takes_the_weights_alone_and_knows_tasks_by_their_content"),
    Control(
        "an earlier run forgotten", 'train.py',
        "(cfg.resume, cfg.init_from))",
        "())",
        "test_train.py::test_what_an_earlier_run_was_trained_on_is_not_forgotten"),
    Control(
        "a search that goes on with nothing", 'decode.py',
        "        if len(live['slot']) == 0: #",
        "        if len(live['slot']) == 0 and ended.any(): #",
        "test_decode.py::test_a_search_may_end_with_a_branch_that_became_too_improbable"),
    Control(
        "a search that forgets branches", 'decode.py',
        "        parent, token = (best | probable)",
        "        probable &= probable.cumsum(1) < 2\n        parent, token = (best | probable)",
        "test_decode.py::test_the_search_finds_what_brute_force_finds"),
    Control(
        "a cache of other rows", 'decode.py',
        "            cache.keep(source)",
        "            cache.keep(source.flip(0))",
        "test_decode.py::test_decoding_together_equals_one_by_one"),
    Control(
        "a branch without the cache of its parent", 'model.py',
        "    x[changed] = x[rows[changed]]",
        "    pass",
        "test_decode.py::test_decoding_together_equals_one_by_one"),
    Control(
        "a row that nobody left given away", 'decode.py',
        "    free[slot] = False",
        "    pass",
        "test_decode.py::test_decoding_together_equals_one_by_one"),
    Control(
        "a judge without a deadline", 'solve.py',
        "        solver.deadline = deadline",
        "        solver.deadline = float('inf')",
        "test_solve.py::test_minutes_bound_the_judge_and_what_he_asked_goes_by_all_queries"),
    Control(
        "filler that a prompt sees", 'solve.py',
        "        if doc.min() == 0:",
        "        if False:",
        "test_solve.py::test_candidates_are_the_same_whatever_goes_together_and_if_memory_runs_out"),
    Control(
        "filler that a scan remembers", 'model.py',
        "        if 'M' in cfg.kinds and doc is not None:",
        "        if False:",
        "test_decode.py::test_filler_before_a_shorter_prompt_changes_nothing"),
    Control(
        "batches without memory that are left out", 'solve.py',
        "                size = len(part) // 2\n",
        "                views, size = views[len(part) :], len(part) // 2\n",
        "test_solve.py::test_candidates_are_the_same_whatever_goes_together_and_if_memory_runs_out"),
    Control(
        "a judge that sees the colors of another view", 'solve.py',
        "[dihedral(x.cmap[c.grid], x.dihedral) for c",
        "[dihedral(c.grid, x.dihedral) for c",
        "test_solve.py::test_a_judge_asks_each_candidate_under_every_view_in_its_own_colors_and_orientation"),
    Control(
        "a judge of one view", 'solve.py',
        "zip(best[query], np.mean(by_view, 0))",
        "zip(best[query], by_view[0])",
        "test_solve.py::test_a_judge_asks_each_candidate_under_every_view_in_its_own_colors_and_orientation"),
    Control(
        "colors undone in the wrong order", 'grids.py',
        "undo_dihedral(colors[grid], d)",
        "undo_dihedral(cmap[grid], d)",
        "test_solve.py::test_views_differ_begin_with_the_query_itself_and_can_be_undone"),
    Control(
        "test-time training of the model itself", 'solve.py',
        "    tuned = copy.deepcopy(model)\n",
        "    tuned = model\n",
        "test_finetune.py::test_test_time_training_leaves_the_model_as_it_is"),
    Control(
        "a leak that the checkpoint does not tell", 'train.py',
        "'leaks': self.ds.leaks, ",
        "'leaks': [], ",
        "test_solve.py::test_a_leak_that_training_was_allowed_is_in_its_checkpoint_and_in_the_score"),
    Control(
        "a leak that solve.json does not tell", 'solve.py',
        "'leaks': sorted(leaks)}",
        "'leaks': []}",
        "test_solve.py::test_a_model_that_has_learned_its_tasks_solves_them"),
    Control(
        "candidates that are kept but not gone on with", 'submission.py',
        "            self.learn(*read_known(path, settings))\n",
        "            read_known(path, settings)\n",
        "test_solve.py::test_a_signal_writes_what_is_known_and_the_same_command_goes_on"),
    Control(
        "views that a solve decodes again", 'solve.py',
        "            self.seen += [x for x in views if x.number in known.seen]\n",
        "",
        "test_solve.py::test_a_signal_writes_what_is_known_and_the_same_command_goes_on"),
    Control(
        "a group that counts as done when it was stopped", 'submission.py',
        "self.solver.known(self.signals.got == 0)",
        "self.solver.known(True)",
        "test_solve.py::test_a_signal_writes_what_is_known_and_the_same_command_goes_on"),
    Control(
        "a submission that is not written on SIGTERM", 'solve.py',
        "    if rank == 0 and any(parts): #",
        "    if rank == 0 and any(parts) and not signals.got: #",
        "test_solve.py::test_a_signal_writes_what_is_known_and_the_same_command_goes_on"),
    Control(
        "other settings that pass", 'submission.py',
        "        wrong = differences(kept['settings'], settings, 'kept')\n",
        "        wrong = []\n",
        "test_solve.py::test_a_solve_goes_on_with_the_same_settings_alone"),
    Control(
        "a directory that nobody tried", 'solve.py',
        "hold(out_dir) if is_first_rank() else contextlib.nullcontext():\n",
        "contextlib.nullcontext():\n",
        "test_solve.py::test_a_directory_that_cannot_be_written_is_refused_before_the_model_is_loaded"),
    Control(
        "results that are all there is of a solve", 'submission.py',
        "                path.unlink()\n",
        "                pass\n",
        "test_solve.py::test_a_solve_goes_on_with_the_same_settings_alone"),
    Control(
        "a command that wants to be read", 'cli.py',
        "        except OSError as e: # what waits",
        "        except MemoryError as e: # what waits",
        "test_reliability.py::test_solve_needs_nobody_who_reads_its_output"),
    Control(
        "minutes of each start", 'submission.py',
        "        self.spent = max(self.spent, spent)\n",
        "",
        "test_solve.py::test_minutes_are_those_of_all_starts"),
    Control(
        "saves that take all the time", 'submission.py',
        " - t) / self.SHARE",
        " - t) * self.SHARE",
        "test_solve.py::test_saving_takes_a_share_of_the_time_however_long_it_takes"),
    Control(
        "a score without a word", 'submission.py',
        "            except ValueError as e:\n                said.append(('broken', str(e)))\n",
        "            except ValueError:\n                pass\n",
        "test_submission.py::test_a_perfect_submission_in_another_shape_is_read_or_named_with_what_was_found"),
    Control(
        "attempts that close a gap", 'submission.py',
        "            best = ranked.get((k, i), [])",
        "            best = ranked.get((k, i), ranked.get((k, i + 1), []))",
        "test_submission.py::test_attempts_differ_and_every_query_has_an_entry_in_order"),
    Control(
        "the rows of a vocabulary in another order", 'lm.py',
        "part.weight.detach()[kept].clone()",
        "part.weight.detach()[kept.flip(0)].clone()",
        "test_lm.py::test_a_shrunk_vocabulary_has_the_same_logits_on_the_tokens_that_are_kept"),
    Control(
        "a document that nobody sees begin", 'lm.py',
        "begun[:, 1:] = doc[:, 1:] != doc[:, :-1]",
        "pass",
        "test_lm.py::test_a_packed_row_equals_its_documents_alone"),
    Control(
        "documents that a language model sees together", 'lm.py',
        "return place - torch.where(begins, place, 0).cummax(1).values",
        "return place",
        "test_lm.py::test_a_packed_row_equals_its_documents_alone"),
    Control(
        "a scan that forgets", 'lm.py',
        "        if n > 0 and not self.takes_several:",
        "        if False:",
        "test_lm.py::test_every_class_trains_and_decodes_with_caches_as_without"),
    Control(
        "places that transformers counts", 'lm.py',
        "            kwargs['position_ids'] = place",
        "            pass",
        "test_lm.py::test_every_class_trains_and_decodes_with_caches_as_without"),
    Control(
        "adapters that nothing goes through", 'lm.py',
        "        refused = ['dt_proj']",
        "        refused = ['none']",
        "test_lm.py::test_every_class_trains_and_decodes_with_caches_as_without"),
    Control(
        "filler that a language model sees", 'lm.py',
        "            if cache.real is not None:\n",
        "            if False:\n",
        "test_lm.py::test_prompts_of_several_lengths_go_together"),
    Control(
        "places that filler counts in", 'lm.py',
        "            place = (cache.real.cumsum(1) - 1)[:, n:]\n",
        "            place = torch.arange(n, n + x.ids.size(1), device=idx.device).expand_as(x.ids)\n",
        "test_lm.py::test_prompts_of_several_lengths_go_together"),
    Control(
        "rows that end before the others", 'lm.py',
        "to_the_right=is_prompt)",
        "to_the_right=False)",
        "test_lm.py::test_prompts_of_several_lengths_go_together"),
    Control(
        "longer answers that begin with nothing", 'lm.py',
        "to_the_right=is_prompt)",
        "to_the_right=cache is not None)",
        "test_lm.py::test_answers_of_several_lengths_are_scored_as_alone"),
    Control(
        "mixers without adapters", 'lm.py',
        "and 'adapter_list' not in name:",
        "and 'adapter_list' not in name and 'in_proj' not in name:",
        "test_lm.py::test_every_mixer_has_adapters_but_where_peft_forbids_it"),
    Control(
        "a loss of what is not asked", 'lm.py',
        "F.pad(targets[:, :-1] >= 0, (1, 0)) #",
        "F.pad(targets[:, :-1] >= 0, (0, 1)) #",
        "test_lm.py::test_the_loss_is_that_of_all_tokens_of_the_symbols_that_carry_it"),
    Control(
        "a loss of tokens that do not exist", 'lm.py',
        "        asked &= torch.arange",
        "        asked | torch.arange",
        "test_lm.py::test_the_loss_of_a_row_does_not_depend_on_who_shares_the_batch"),
    Control(
        "a base of 16 bits outside autocast", 'lm.py',
        "        if self.dtype != torch.float32 and not",
        "        if False and not",
        "test_lm.py::test_frozen_weights_may_be_bf16"),
    Control(
        "layers that are in training while they decode", 'lm.py',
        "m.training = torch.is_grad_enabled()",
        "m.training = True",
        "test_lm.py::test_recomputed_activations_give_the_same_gradients"),
    Control(
        "a judge of views that nobody decoded", 'solve.py',
        "asked = [x for x in self.seen if a",
        "asked = [x for x in self.views if a",
        "test_solve.py::test_minutes_bound_the_views_and_every_query_gets_one"),
    Control(
        "a base that nobody hashes", 'lm.py',
        "if cfg.base_sha256 and hash_base(cfg.base) != cfg.base_sha256:",
        "if False:",
        "test_finetune.py::test_the_wrong_base_is_refused_by_name_and_a_moved_one_is_not"),
    Control(
        "a copy that shares all", 'lm.py',
        "            if name not in self.trained:\n                memo",
        "            if True:\n                memo",
        "test_lm.py::test_a_copy_shares_what_is_not_trained"),
    Control(
        "an export without its adapters", 'finetune.py',
        "            m.merge()\n",
        "            pass\n",
        "test_finetune.py::test_an_export_is_a_model_of_transformers_that_gives_the_same_logits"),
    Control(
        "symbols that are encoded alone", 'lm.py',
        "        if b[: len(a)] == a and len(b) > len(a):",
        "        if False:",
        "test_lm.py::test_what_the_model_is_given_are_the_tokenizers_own_tokens_of_1000_augmented_tasks"),
    Control(
        "text targets that are their own tokens", 'text.py',
        "batch.targets.numpy()[:] = rows[:, 1:]",
        "batch.targets.numpy()[:] = rows[:, :-1]",
        "test_text.py::test_shuffled_it_is_the_same_in_plain_python"),
    Control(
        "a last batch too many of a shard", 'text.py',
        "(self.sizes - 1 - a * T) // G",
        "(self.sizes - 1) // G",
        "test_text.py::test_in_sequence_it_is_the_loader_of_build_nanogpt"),
    Control(
        "every epoch of text in the same order", 'text.py',
        "key = hash64(self.seed, EPOCH, epoch)",
        "key = hash64(self.seed, EPOCH, 0 * epoch)",
        "test_text.py::test_an_epoch_has_each_window_once_and_no_two_seeds_or_epochs_are_alike"),
    Control(
        "one buffer of text", 'text.py',
        "buffers = self.ring[turn]\n",
        "buffers, turn = self.ring[0], 0\n",
        "test_text.py::test_a_batch_is_valid_until_the_second_next_call"),
    Control(
        "a shard that nobody hashes", 'text.py',
        "        if found != x.get('sha256', found):",
        "        if False:",
        "test_text.py::test_a_changed_shard_tokenizer_or_manifest_is_refused_by_its_name"),
    Control(
        "documents that a resumed preparation repeats", 'text.py',
        "self.state.update(documents=number, used=used,",
        "self.state.update(documents=number, used=0,",
        "test_text.py::test_a_kill_before_and_after_each_file_of_prepare_loses_nothing"),
    Control(
        "a text that can write end-of-text", 'text.py',
        "    tok.encode_special_tokens = True\n",
        "",
        "test_text.py::test_documents_come_back_from_the_shards_whatever_they_were_read_from"),
    Control(
        "acc_norm without the norm", 'hellaswag.py',
        "(total / count).argmin()",
        "total.argmin()",
        "test_hellaswag.py::test_acc_is_by_the_sum_and_acc_norm_by_the_mean_of_the_losses"),
    Control(
        "endings that are not counted from their first token", 'hellaswag.py',
        ">= n[:, None]",
        ">= 99 + n[:, None]",
        "test_hellaswag.py::test_a_context_that_is_read_once_gives_the_losses_of_the_whole"),
    Control(
        "a cache that some models do not have", 'hellaswag.py',
        " and all(type(x) in plain for x in cache.layers)",
        "",
        "test_hellaswag.py::test_models_of_transformers_are_asked_the_same_with_their_cache_or_without"),
    Control(
        "items that each rank counts", 'hellaswag.py',
        "items[rank::world]",
        "items",
        "test_hellaswag.py::test_two_ranks_count_each_item_once"),
    Control(
        "empty rows that are one large document", 'train.py',
        "device=batch.doc.device) // 128",
        "device=batch.doc.device) * 0",
        "test_train.py::test_batches_are_filled_up_for_a_compiler"),
    Control(
        "another tokenizer's embedding", 'run.py',
        "and meta['stream']['tokenizer_sha256'] != ds.tokenizer_sha256:",
        "and meta['model']['vocab_size'] != model.cfg.vocab_size:",
        "test_text.py::test_other_text_begins_with_all_of_it_if_the_tokens_are_the_same"),
    Control(
        "a tokenizer that stays behind", 'train.py',
        "            for name, data in ds.files.items():\n",
        "            for name, data in ():\n",
        "test_hellaswag.py::test_a_run_that_moved_has_its_tokenizer"),
    Control(
        "a nucleus without its last token", 'hellaswag.py',
        "before = p.cumsum(-1) - p #",
        "before = p.cumsum(-1) #",
        "test_hellaswag.py::test_drawn_tokens_have_the_probabilities_of_what_is_left"),
    Control(
        "a validation that goes on too far", 'text.py',
        "len(self.val[0]) - 1)",
        "len(self.val[0]))",
        "test_text.py::test_validation_is_the_beginning_of_the_validation_shard_each_row_once"),
    Control(
        "trials that take all threads", 'sweep.py',
        "// self.cfg.jobs, 1)",
        ", 1)",
        "test_sweep.py::test_a_trial_has_its_share_of_the_threads"),
    Control(
        "a sweep without the default", 'sweep.py',
        "            first = first_trial(search, run)\n",
        "            first = {}\n",
        "test_sweep.py::test_a_trial_has_its_share_of_the_threads"),
    Control(
        "a pruner that nobody hears", 'sweep.py',
        "prune = prune or (tenth",
        "prune = False and (tenth",
        "test_sweep.py::test_a_trial_worse_than_the_others_is_stopped"),
    Control(
        "a failed trial that ends all", 'sweep.py',
        "catch=Failed,\n",
        "\n",
        "test_sweep.py::test_a_trial_that_fails_fails_alone_and_train_takes_the_best"),
    Control(
        "a search over what is measured", 'sweep.py',
        "    if name in MEASURE:",
        "    if False:",
        "test_sweep.py::test_a_bad_space_is_refused_by_file_and_key"),
    Control(
        "warm-up that knows no share", 'train.py',
        "cfg.warmup_frac * max_iters or ",
        "",
        "test_sweep.py::test_warm_up_as_a_share_of_the_steps"),
]

def planted(control, temp, env):
    """ plants the bug in the copy of the sources in temp and runs its test -> pytest's exit code. 1 = red """
    path = Path(temp) / 'nanoarc' / control.file
    text = path.read_text()
    n = text.count(control.line)
    assert n == 1, f"{control.name}: {control.file} has this line {n} times: {control.line}"
    path.write_text(text.replace(control.line, control.bug))
    command = [sys.executable, '-m', 'pytest', '-q', '-x', '-p', 'no:cacheprovider', f"tests/{control.test}"]
    try:
        return subprocess.run(command, cwd=temp, env=env, capture_output=True, timeout=180).returncode
    except subprocess.TimeoutExpired: # a test that hangs is red too
        return 1
    finally:
        path.write_text(text)

def main(words):
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONDONTWRITEBYTECODE': '1'}
    controls = []
    for control in CONTROLS:
        if all(word in control.name + control.file + control.test for word in words):
            controls.append(control)
    tests = sorted({f"tests/{control.test}" for control in controls})
    if subprocess.run([sys.executable, '-m', 'pytest', '-q', *tests], cwd=ROOT, env=env).returncode:
        sys.exit("these tests are to be green first")
    unseen = 0
    with tempfile.TemporaryDirectory() as temp:
        for folder in ('nanoarc', 'tests'):
            shutil.copytree(ROOT / folder, Path(temp) / folder)
        shutil.copy(ROOT / 'pyproject.toml', temp)
        for control in controls:
            code = planted(control, temp, {**env, 'PYTHONPATH': temp})
            how = {1: "red, as it must be", 0: "NOT SEEN"}.get(code, f"pytest failed, exit code {code}")
            print(f"{how}: {control.name}", flush=True)
            unseen += code != 1
    print(f"{len(controls) - unseen} of {len(controls)} planted bugs were seen")
    sys.exit(unseen > 0)

if __name__ == '__main__':
    main(sys.argv[1:])
