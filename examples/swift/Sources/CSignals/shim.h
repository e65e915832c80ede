// Signals as a descriptor, which Swift's Glibc module leaves out.
#include <sys/signalfd.h>
