
def embedded_model(): return "/tmp/smolhf"
