""" a tiny llama from scratch with hugging face's Trainer, nothing is downloaded. python examples/hf_trainer.py """
import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from nanoarc.data import VOCAB_SIZE, ArcDataset, DataConfig

def to_hf(batch):
    """ Batch (B, T) -> arguments of a causal LM. transformers shifts labels to the left, so they go to the right """
    labels = torch.full_like(batch.targets, -100)
    labels[:, 1:] = batch.targets[:, :-1] # nothing is lost: the last column is END or PAD, which carry no loss
    starts = torch.diff(batch.doc, prepend=torch.full_like(batch.doc[:, :1], -2)) != 0 # (B, T) begin documents
    t = torch.arange(batch.idx.shape[1])
    places = t - torch.where(starts, t, 0).cummax(1).values # (B, T) from 0 within a document
    return {'input_ids': batch.idx, 'labels': labels, 'attention_mask': (batch.doc >= 0).long(), 'position_ids': places}

class ArcTrainer(Trainer):
    def get_train_dataloader(self): # its own would shuffle once more, across epochs
        ds, size = self.train_dataset, self.args.per_device_train_batch_size
        return self.accelerator.prepare(DataLoader(ds, size, collate_fn=lambda items: to_hf(ds.collate(items))))

def main(cfg=DataConfig(shots=-1, block_size=512), steps=20, out='out/hf_trainer', resume=None):
    ds = ArcDataset(cfg, epochs=1000) # so often each pair is a target, under another augment each time
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=cfg.block_size, pad_token_id=None, bos_token_id=None, eos_token_id=None))
    args = TrainingArguments(
        out, max_steps=steps, per_device_train_batch_size=8, learning_rate=1e-3, lr_scheduler_type='constant',
        logging_steps=1, save_steps=10, report_to='none', use_cpu=True, remove_unused_columns=False)
    trainer = ArcTrainer(model, args, train_dataset=ds)
    trainer.train(resume_from_checkpoint=resume) # resume: a folder in out. Trainer counts the documents itself

if __name__ == '__main__':
    main()
