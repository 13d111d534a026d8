# A Llama of 20M parameters in the shape of SmolLM2, trained from scratch on Chinese text. Transformers loads
# its exports as LlamaForCausalLM.
#   python data/chinese/prepare.py
#   python train.py config/train_llama_small.py
#   python sample.py --out_dir=out-llama-small --start="水调歌头"
#   python sample.py --out_dir=out-llama-small --export=exported

out_dir = 'out-llama-small'
dataset = 'chinese'
eval_interval = 250
eval_iters = 20
log_interval = 10

arch = 'llama'
n_layer = 12
n_head = 6
n_kv_head = 2
n_embd = 384
n_hidden = 1024
tied = True
block_size = 256
batch_size = 16
gradient_accumulation_steps = 1

optimizer = 'muon'
matrix_lr = 0.02
learning_rate = 3e-3
weight_decay = 0.01

max_iters = 1500
lr_schedule = 'wsd'
warmup_iters = 50
min_lr = 0.0
