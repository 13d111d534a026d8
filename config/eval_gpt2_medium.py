# The loss of gpt2-medium (n_layer=24, n_head=16, n_embd=1024: 350M parameters) on OpenWebText. nanoGPT
# publishes 2.84 for its validation split.
#   python data/openwebtext/prepare.py
#   python train.py config/eval_gpt2_medium.py

batch_size = 8
eval_iters = 500  # many, for a precise estimate
eval_only = True
wandb_log = False
init_from = 'gpt2-medium'
