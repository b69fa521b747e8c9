"""How much load a deployment takes: a cost model fitted from measurement, a simulation that runs the
server's own RequestQueue, and the search for the replicas and the policy that keep a target."""
