# The loss of gpt2 (n_layer=12, n_head=12, n_embd=768: 124M parameters) on OpenWebText. nanoGPT publishes
# 3.12 for its validation split.
#   python data/openwebtext/prepare.py
#   python train.py config/eval_gpt2.py

batch_size = 8
eval_iters = 500  # many, for a precise estimate
eval_only = True
wandb_log = False
init_from = 'gpt2'
