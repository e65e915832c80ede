import CLinux
import Glibc

/// The processors of this process.
package enum Processors {
  /// How many the process may run on, considering affinity.
  package static let count: Int = {
    var set = cpu_set_t()
    let size = MemoryLayout<cpu_set_t>.size
    guard sched_getaffinity(0, size, &set) == 0 else {
      return max(1, Int(sysconf(Int32(_SC_NPROCESSORS_ONLN))))
    }
    return max(1, withUnsafeBytes(of: set) { $0.reduce(0) { $0 + $1.nonzeroBitCount } })
  }()
}
