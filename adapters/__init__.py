"""The core of MoE Studio: expert layouts, routed experts, 4-bit expert stacks, expert LoRA, PEFT files, merge.

Import from the module that holds the thing; this file imports none of them, so that the modules marked * answer without
loading torch.

    errors        * the root of the error tree
    layouts       * one table of how each model family names and orders its experts
    placement     * which tensor classes and which experts get adapters, and of what rank
    checkpoint    * what a base directory holds, from safetensors headers alone
    workspace     * how much of a layer's experts is worked on at one time
    tensor_files    exact reads and atomic writes of safetensors files
    quantized       4-bit expert stacks with bitsandbytes' bytes
    expert_math     forward and backward of one layer's experts; products, lora_products: what they multiply
    routed          routed experts: only routed (token, expert) pairs are computed
    routing         what the routers do in a forward pass; router_losses: losses on it
    router_profile  where a sample of the data goes, layer by layer and expert by expert (numpy alone)
    loading         a base model streamed from its files, quantised one expert at a time
    lora            expert LoRA as a PEFT layer; `attach` puts a placement on a model
    deltas          how far training moved each expert
    peft_files      the standard PEFT adapter directory, written and read
    compact         the adapter with each expert's own rank; to the standard form and back
    factors         an adapter as a list of parts: what is combined, and what every adapter form is made of
    combine         several adapters as one: sums, TIES, DARE
    merge           base + adapter, tensor by tensor
"""

import logging

# an optional kernel that bitsandbytes would fetch from the hub: not wanted here, so its absence is no news
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
