"""TOFU: a weight update as the gradients of a few proxy images, with a sparse correction of what these miss.

Garg, Nagaraj, Roy, "TOFU: Towards Obfuscated Federated Updates by Encoding Weight Updates into Gradients from Proxy
Data", arXiv 2201.08494. Read the modules in this order:

- `proxies`: what proxies are, their bytes, and how they decode (the paper's section 3: one backward pass)
- `search`: how a client finds them (the paper's algorithm 1: gradient descent on pixels and labels)
- `surrogate`: the smooth activations that both ends differentiate through; ours
- `correction` and `strata`: the largest entries of what the proxies miss; ours
- `compressor`: all of this as one `tofu.compression.base.Compressor`
- `options`: everything that can be set
"""
