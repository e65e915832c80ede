import Glibc

/// Processor time of the process, in user and kernel mode together.
struct ProcessorTime {
  let seconds: Double

  static func now() -> ProcessorTime {
    var usage = rusage()
    getrusage(RUSAGE_SELF.rawValue, &usage)
    return ProcessorTime(seconds: seconds(usage.ru_utime) + seconds(usage.ru_stime))
  }

  private static func seconds(_ time: timeval) -> Double {
    Double(time.tv_sec) + Double(time.tv_usec) / 1e6
  }
}
