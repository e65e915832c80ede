// Release builds link the Swift runtime statically (Package.swift). With a shared one, as in debug
// builds, this would not link.
#if !DEBUG
  import CSwiftRuntime
  import Glibc

  private enum RuntimeLocks {
    // The runtime's locks name their owner by a thread number that it caches for each thread, and
    // `fork` copies that. If the forking thread meets another of the child in the first use of a
    // type, the owner would be a thread of the parent: the kernel refuses to pass such a lock from
    // one to the other, and both try again forever.
    @used
    @section(".init_array")
    private nonisolated(unsafe) static let register: @convention(c) () -> Void = {
      pthread_atfork(nil, nil, { swift_runtime_forget_thread_number() })
    }
  }
#endif
