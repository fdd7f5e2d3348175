"""One model over several devices, a process each, with micro batches in flight on all of them: the one loop that Trainer cannot be.

cutting     the layers of one stage, loaded from files; proof that it has them and nothing else
schedule    micro batches of a step through torch.distributed.pipelining
saving      a checkpoint from the parts of all stages
loop        steps, clipping over all stages, evaluation, logging: what the Trainer does elsewhere
"""
