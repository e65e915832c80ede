// swift-format-ignore-file: AlwaysUseLowerCamelCase

// Section "Version and errors" of mooncake.h.
import CMooncake
import Glibc
import MooncakeBase
import MooncakeEngine

// Never written again and never freed, because callers keep it.
nonisolated(unsafe) private let versionText = strdup(
  "\(MOONCAKE_VERSION_MAJOR).\(MOONCAKE_VERSION_MINOR).\(MOONCAKE_VERSION_PATCH)")

func prepareVersion() { _ = versionText }

/// A literal for C: NUL-terminated, in static storage.
private func cString(_ text: StaticString) -> UnsafePointer<CChar> {
  UnsafeRawPointer(text.utf8Start).assumingMemoryBound(to: CChar.self)
}

/// Version of the library as text.
@c @implementation
package func mooncake_version() -> UnsafePointer<CChar>? {
  Globals.prepare()
  return UnsafePointer(versionText)
}

/// Version of the library as one number.
@c @implementation
package func mooncake_version_number() -> UInt32 {
  UInt32(MOONCAKE_VERSION_MAJOR) * 1_000_000 + UInt32(MOONCAKE_VERSION_MINOR) * 1000
    + UInt32(MOONCAKE_VERSION_PATCH)
}

/// Name of an error code.
@c @implementation
package func mooncake_error_name(_ code: Int32) -> UnsafePointer<CChar>? {
  if code == 0 { return cString("MOONCAKE_OK") }
  guard let code = MooncakeError.Code(rawValue: code) else {
    return cString("MOONCAKE_ERROR_UNKNOWN")
  }
  return cString(code.headerName)
}

/// Why the calling thread's last call failed.
@c @implementation
package func mooncake_error_message() -> UnsafePointer<CChar>? {
  Globals.prepare()
  return ThreadState.message ?? cString("")
}

extension MooncakeError.Code {
  fileprivate var headerName: StaticString {
    switch self {
    case .invalidArgument: "MOONCAKE_ERROR_INVALID_ARGUMENT"
    case .invalidHandle: "MOONCAKE_ERROR_INVALID_HANDLE"
    case .notRegistered: "MOONCAKE_ERROR_NOT_REGISTERED"
    case .overlap: "MOONCAKE_ERROR_OVERLAP"
    case .accessDenied: "MOONCAKE_ERROR_ACCESS_DENIED"
    case .busy: "MOONCAKE_ERROR_BUSY"
    case .full: "MOONCAKE_ERROR_FULL"
    case .outOfMemory: "MOONCAKE_ERROR_OUT_OF_MEMORY"
    case .addressInUse: "MOONCAKE_ERROR_ADDRESS_IN_USE"
    case .unresolved: "MOONCAKE_ERROR_UNRESOLVED"
    case .unreachable: "MOONCAKE_ERROR_UNREACHABLE"
    case .protocolViolation: "MOONCAKE_ERROR_PROTOCOL"
    case .notFound: "MOONCAKE_ERROR_NOT_FOUND"
    case .timeout: "MOONCAKE_ERROR_TIMEOUT"
    case .canceled: "MOONCAKE_ERROR_CANCELED"
    case .unsupported: "MOONCAKE_ERROR_UNSUPPORTED"
    case .system: "MOONCAKE_ERROR_SYSTEM"
    case .exists: "MOONCAKE_ERROR_EXISTS"
    case .notHeld: "MOONCAKE_ERROR_NOT_HELD"
    case .sizeMismatch: "MOONCAKE_ERROR_SIZE_MISMATCH"
    case .digestMismatch: "MOONCAKE_ERROR_DIGEST_MISMATCH"
    case .noHolder: "MOONCAKE_ERROR_NO_HOLDER"
    }
  }
}
