import ArgumentParser

/// A number of bytes as people write it: 4096, 4KiB, 64M, 1GiB; KB, MB, GB and TB are decimal.
struct ByteCount: ExpressibleByArgument, Equatable {
  let value: UInt64

  init(_ value: UInt64) { self.value = value }

  init?(argument: String) {
    let digits = argument.prefix { $0.isASCII && $0.isNumber }
    guard let number = UInt64(digits),
      let factor = Self.factor(String(argument.dropFirst(digits.count)).lowercased())
    else { return nil }
    let (product, overflow) = number.multipliedReportingOverflow(by: factor)
    if overflow { return nil }
    value = product
  }

  private static func factor(_ unit: String) -> UInt64? {
    switch unit {
    case "", "b": 1
    case "k", "kib": 1 << 10
    case "m", "mib": 1 << 20
    case "g", "gib": 1 << 30
    case "t", "tib": 1 << 40
    case "kb": 1_000
    case "mb": 1_000_000
    case "gb": 1_000_000_000
    case "tb": 1_000_000_000_000
    default: nil
    }
  }

  /// With the largest binary unit that divides the value.
  var description: String {
    let units: [(String, UInt64)] = [
      ("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10),
    ]
    for (name, size) in units where value >= size && value % size == 0 {
      return "\(value / size)\(name)"
    }
    return "\(value)"
  }

  var defaultValueDescription: String { description }
}

/// A length of time: 5, 0.5, 500ms, 10s, 2m.
struct TimeSpan: ExpressibleByArgument {
  let nanoseconds: UInt64

  init(seconds: UInt64) { nanoseconds = seconds &* 1_000_000_000 }

  init(milliseconds: UInt64) { nanoseconds = milliseconds &* 1_000_000 }

  init?(argument: String) {
    let digits = argument.prefix { $0.isASCII && ($0.isNumber || $0 == ".") }
    guard let number = Double(digits) else { return nil }
    let unit: Double
    switch argument.dropFirst(digits.count) {
    case "ms": unit = 1e6
    case "", "s": unit = 1e9
    case "m": unit = 60e9
    case "h": unit = 3600e9
    default: return nil
    }
    // At most a year: longer than any run and far from overflow.
    guard number * unit <= 31_536_000e9 else { return nil }
    nanoseconds = UInt64(number * unit)
  }

  var milliseconds: UInt64 { nanoseconds / 1_000_000 }
  var seconds: Double { Double(nanoseconds) / 1e9 }
  var defaultValueDescription: String { decimal(seconds, places: 0) }
}

/// Values separated by commas, with one run for each.
struct Sweep<Element: ExpressibleByArgument>: ExpressibleByArgument {
  let values: [Element]

  init(_ value: Element) { values = [value] }

  init?(argument: String) {
    var values: [Element] = []
    for part in argument.split(separator: ",", omittingEmptySubsequences: false) {
      guard let value = Element(argument: String(part)) else { return nil }
      values.append(value)
    }
    self.values = values
  }

  var defaultValueDescription: String {
    values.map(\.defaultValueDescription).joined(separator: ",")
  }
}

/// A number with a fixed count of decimal places.
func decimal(_ value: Double, places: Int) -> String {
  guard value.isFinite, abs(value) < 1e15 else { return "0" }
  var scale = 1.0
  for _ in 0..<places { scale *= 10 }
  let scaled = UInt64((abs(value) * scale).rounded())
  let unit = UInt64(scale)
  let sign = value < 0 && scaled > 0 ? "-" : ""
  if places == 0 { return sign + "\(scaled)" }
  let fraction = String(scaled % unit)
  let zeros = String(repeating: "0", count: places - fraction.count)
  return "\(sign)\(scaled / unit).\(zeros)\(fraction)"
}

/// A number of bytes for people, such as "90.9 MB".
func readableBytes(_ value: UInt64) -> String {
  let amount = Double(value)
  if amount >= 1e12 { return decimal(amount / 1e12, places: 2) + " TB" }
  if amount >= 1e9 { return decimal(amount / 1e9, places: 2) + " GB" }
  if amount >= 1e6 { return decimal(amount / 1e6, places: 1) + " MB" }
  if amount >= 1e3 { return decimal(amount / 1e3, places: 1) + " kB" }
  return "\(value) bytes"
}

/// An address as "0x…".
func hexadecimal(_ value: UInt64) -> String { "0x" + String(value, radix: 16) }
