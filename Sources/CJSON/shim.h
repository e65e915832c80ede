// The cJSON library's own header.
#include <cjson/cJSON.h>
