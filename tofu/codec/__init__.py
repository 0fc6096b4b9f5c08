"""The TOFU codec: encodes an update as proxies, whose gradients approximate it, and a sparse correction of the error.

Garg, Nagaraj, Roy, "TOFU: Towards Obfuscated Federated Updates by Encoding Weight Updates into Gradients from Proxy
Data", arXiv 2201.08494. Read the modules in this order:

- `proxies`: definition, byte format and decoding of proxies by one backward pass (the paper's section 3)
- `search`: the optimization of pixels and labels on the client (the paper's algorithm 1)
- `chain`: faster gradients for networks that are chains of layers; ours
- `surrogate`: smooth activations that replace ReLU and max-pooling in the codec; ours
- `correction`: the largest entries of the update minus the decoded proxies; ours
- `compressor`: the parts above as one `tofu.compression.base.Compressor`
- `options`: the options of all of them
"""
