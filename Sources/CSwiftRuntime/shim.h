// What the library reaches inside the Swift runtime that is linked into it.
#ifndef CSWIFTRUNTIME_SHIM_H
#define CSWIFTRUNTIME_SHIM_H

// swift::threading_impl::linux::ulock_get_tid()::tid: the thread's number, which the runtime caches
// and by which its locks name their owner; 0 before the first lock. A runtime that is a shared
// library of its own hides the symbol, so whatever uses this links only with a static one, and only
// while that has it: a runtime without the symbol locks in another way and needs another look.
extern __thread int swift_runtime_thread_number
    __asm__("_ZZN5swift14threading_impl5linux13ulock_get_tidEvE3tid")
    __attribute__((visibility("hidden")));

// The runtime then asks the kernel again before its next lock.
static inline void swift_runtime_forget_thread_number(void) { swift_runtime_thread_number = 0; }

#endif
