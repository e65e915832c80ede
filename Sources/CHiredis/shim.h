// The parser and the formatter of hiredis; the library is opened at run time.
#include <hiredis/hiredis.h>
