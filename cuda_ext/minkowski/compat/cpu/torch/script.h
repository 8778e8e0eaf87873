// direct_max_pool.cpp includes this header of torch and uses nothing of it.
#pragma once
