"""The bodies of the Triton kernels, one op a file; importing one needs Triton."""
