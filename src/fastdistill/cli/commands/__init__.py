"The subcommands of `fastdistill`."
