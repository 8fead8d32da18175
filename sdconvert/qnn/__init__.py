"""The HTP side: context binaries from Q/DQ graphs, read back, reloaded and run in Qualcomm's simulator."""
