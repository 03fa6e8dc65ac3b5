"""The unit of training, `engine.step(batch) -> StepResult`, over DeepSpeed. The only place that imports deepspeed."""
