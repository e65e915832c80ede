import CLinux
import Glibc

/// An error number of the operating system.
public struct Errno: Error, Equatable, Sendable, CustomStringConvertible {
  public let rawValue: Int32
  /// The system call that failed; set only where the message should name it because a sandbox may
  /// forbid it.
  public let call: StaticString?

  public init(_ rawValue: Int32, call: StaticString? = nil) {
    self.rawValue = rawValue
    self.call = call
  }

  /// Whether the numbers are equal.
  public static func == (left: Errno, right: Errno) -> Bool { left.rawValue == right.rawValue }

  /// The calling thread's `errno`.
  package static var current: Errno { Errno(errno) }

  /// The system's text, such as "Connection refused", plus a hint where that text is not enough;
  /// prefixed by the call if known.
  public var description: String {
    let reason =
      switch self {
      case .tooManyOpenFiles: "\(text): this process is out of descriptors, raise ulimit -n"
      case .tooManyOpenFilesInSystem:
        "\(text): this machine is out of descriptors, raise fs.file-max"
      default: text
      }
    return call.map { "\($0): \(reason)" } ?? reason
  }

  private var text: String {
    var text = [CChar](repeating: 0, count: 128)
    // The GNU variant may return a static text instead of filling the buffer.
    guard let message = strerror_r(rawValue, &text, text.count) else { return "errno \(rawValue)" }
    return String(cString: message)
  }

  package static let interrupted = Errno(EINTR)
  package static let wouldBlock = Errno(EAGAIN)
  package static let connectionRefused = Errno(ECONNREFUSED)
  package static let timedOut = Errno(ETIMEDOUT)
  package static let tooManyOpenFiles = Errno(EMFILE)
  package static let tooManyOpenFilesInSystem = Errno(ENFILE)
}

/// Repeats a system call while signals interrupt it; -1 becomes a thrown `Errno`, with the call's
/// name if one is given.
@inline(__always)
package func retryingInterrupts<Result: FixedWidthInteger & SignedInteger>(
  _ name: StaticString? = nil, _ call: () -> Result
) throws(Errno) -> Result {
  while true {
    let result = call()
    if result != -1 { return result }
    let number = errno
    if number != EINTR { throw Errno(number, call: name) }
  }
}
