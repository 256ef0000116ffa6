"""Few-step flow models by distillation, after SD3.5-Flash (arXiv 2509.21318).

| Stage | File |
|---|---|
| teacher: flow matching of a model with CLIP-L and T5 | teacher, model, dropout, align |
| 1: regression onto the teacher's integrals | trajectory |
| 2: distribution matching, timesteps shared or random | match, adversarial, noise |
| 3: split-timestep fine-tuning | match (`branch`), merge |
| a look, as a LoRA for a student | style |
| a LoRA instead of all weights | lora |
| 1 and 2 on any flow model, as a LoRA | few_step_lora, folder; host.training |

`student` is what the stages share, `backbone` what a student is made of, `loop` and `optimize` what
all training shares; `runs` reads a stage's JSON file, `commands` is the command line, `watch` and
`table` show what came of it; `host_run` is the command line for any flow model, `several` its
several processes. `guidance` and `reflow` made the model that ships today.
"""
