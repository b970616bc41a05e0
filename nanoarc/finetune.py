"""
fine-tuning a pretrained language model: `nanoarc finetune --base HUB_ID --data arc1/training --minutes 60 --out_dir
out/lm`, and `nanoarc export`. the corpus, the stream, the loop, the solver and the score are those of a model from
scratch.
"""
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro

from nanoarc import checkpoint
from nanoarc.grids import END, OUT, ROW
from nanoarc.lm import FIRST, LM, LMConfig, hash_base, read_base
from nanoarc.run import saved_configs
from nanoarc.submission import read_fitting, read_leaks, read_submission, score, verdict
from nanoarc.train import train

def finetune(cfg, lm_cfg, data_cfg):
    """ fine-tune to the end -> the meta data of the last checkpoint. raises as train.train """
    if not lm_cfg.base:
        raise ValueError("want a --base: an id on the Hugging Face hub, a directory or a .gguf file")
    if data_cfg.shots == 0:
        raise ValueError("shots=0: a language model has no task embedding, it learns from the demos before the query: "
                         "--shots=-1")
    if cfg.compile == 'on':
        raise ValueError("compile='on': a language model of transformers is run as it is")
    if lm_cfg.shard and (cfg.ema > 0 or cfg.draw_every > 0):
        raise ValueError(f"shard: ema={cfg.ema} draw_every={cfg.draw_every}: averages and pictures want a whole model "
                         "on one rank, --ema=0 --draw_every=0")
    lm_cfg = replace(lm_cfg, base_sha256=lm_cfg.base_sha256 or hash_base(lm_cfg.base))
    return train(cfg, lm_cfg, data_cfg)

@dataclass
class ExportConfig:
    run: Annotated[str, tyro.conf.Positional] # out_dir of a fine-tuning
    out: str # the directory to write
    data: str = '' # a source that the run's submission.json answers, for the score in the model card
    push_to_hub: str = '' # an id on the Hugging Face hub to upload it to, too

def export(cfg):
    """
    a fine-tuned run -> a directory that transformers loads by itself: adapters merged, the rows of the vocabulary
    back in their places, the tokenizer, a model card
    """
    if Path(cfg.out).exists():
        raise ValueError(f"{cfg.out} is there already, choose another --out")
    tensors, meta = checkpoint.load(cfg.run)
    lm_cfg, data_cfg = saved_configs(meta)
    if not isinstance(lm_cfg, LMConfig):
        raise ValueError(f"{cfg.run}: not a run of nanoarc finetune")
    lm = LM(replace(lm_cfg, base_dtype='float32'))
    checkpoint.restore_model(lm, tensors, checkpoint.eval_part(meta))
    is_gguf = lm_cfg.base.endswith('.gguf')
    full, tokenizer = read_base(lm_cfg.base, torch.float32 if is_gguf else 'auto')
    for m in lm.base.modules():
        if hasattr(m, 'merge') and hasattr(m, 'lora_A'):
            m.merge()
    merged = {}
    for name, p in lm.base.named_parameters():
        if '.lora_' not in name:
            merged[name.replace('.base_layer', '')] = p
    with torch.no_grad():
        for name, p in full.named_parameters():
            is_shrunk = merged[name].shape != p.shape # embedding and head may be
            rows = lm.kept if is_shrunk else slice(None)
            p[rows] = merged[name].to(p.dtype)
    if is_gguf: # it is not quantized any more
        del full.config.quantization_config
    full.save_pretrained(cfg.out)
    tokenizer.save_pretrained(cfg.out)
    card = model_card(cfg, lm, full, lm_cfg, data_cfg, meta)
    checkpoint.write_file(Path(cfg.out) / 'README.md', card.encode())
    if cfg.push_to_hub:
        from huggingface_hub import HfApi
        HfApi().create_repo(cfg.push_to_hub, exist_ok=True)
        HfApi().upload_folder(repo_id=cfg.push_to_hub, folder_path=cfg.out)

def model_card(cfg, lm, full, lm_cfg, data_cfg, meta):
    """ what the model is and how good, as markdown. full: as transformers has it """
    name = lm_cfg.base
    head = f"base_model: {name}"
    if Path(name).exists(): # where it lies here is nobody's business
        name = Path(name).name
        head = "library_name: transformers"
    data = f"`{data_cfg.data}`"
    if data_cfg.adapt:
        data += f" and the demos of `{data_cfg.adapt}`"
    if data_cfg.extra:
        data += f" and the generated pairs of `{data_cfg.extra}`"
    val = "no validation"
    if meta['val_loss'] is not None:
        val = f"{meta['val_loss']:.4f} nats per output token on held out queries"
    looked_up = full.get_input_embeddings().weight.numel()
    lines = ["---", head, "tags: [arc-agi, nanoarc]", "---", f"fine-tuned from `{name}` by nanoarc on {data}.", "",
             f"- {meta['step']} steps, {meta['tokens']:,} tokens, {replace(lm_cfg, base=name).about()}",
             f"- {full.num_parameters():,} parameters, {looked_up:,} of them embeddings",
             f"- {val}"]
    if cfg.data:
        path = Path(cfg.run) / 'submission.json'
        result = score(read_submission(path), read_fitting(cfg.data, data_cfg.max_pair, opened=True)[1])
        lines.append(f"- {cfg.data}: {verdict(result, read_leaks(path))}. what the base has read before, nobody "
                     "checks: ARC-AGI-1 has been public since 2019")
    pair = "".join(lm.form.text[x] for x in (FIRST, 1, 2, ROW, 3, 4, ROW, OUT, 5, ROW, END))
    lines += ["", "A pair is written so, demos first, the query last, and its answer is asked for behind the last "
              "marker:", "", "```", pair, "```", ""]
    return "\n".join(lines)
