"""The strategy "fused" as Pallas kernels (:mod:`.fused`), for GPUs (:mod:`.gpu`) and TPUs (:mod:`.tpu`)."""
